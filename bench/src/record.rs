//! One measured case, as it is printed.

use serde::Serialize;

/// One case. `ratio` above 1 means that ours is better.
#[derive(Debug, Clone, Serialize)]
pub struct Record {
    /// `vfs`, `net`, ...
    pub bench: &'static str,
    /// What was measured.
    pub case: String,
    /// `userspace`, `rumprun`, `linux-module`.
    pub target: &'static str,
    /// Of `ours` and `theirs`.
    pub unit: &'static str,
    /// Median.
    pub ours: f64,
    /// What it is compared with.
    pub peer: String,
    /// Median of the peer, measured in the same run.
    pub theirs: f64,
    /// Median of the runs' ratios.
    pub ratio: f64,
    /// The least ratio that was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub goal: Option<f64>,
    /// How often each was measured.
    pub runs: usize,
    /// (max - min) / median of the ratios.
    pub spread: f64,
    /// The smallest of the ratios.
    pub ratio_min: f64,
    /// The largest.
    pub ratio_max: f64,
    /// Published figures of others, marked as such, and what else is to be said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

/// Which way is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Better {
    /// Throughput.
    Higher,
    /// Time, size.
    Lower,
}

/// The middle of `values` (the upper one of two).
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

impl Record {
    /// Makes a record of runs taken in turns: pair `i` of `ours` and `theirs` belongs together.
    pub fn new(
        (bench, case, target): (&'static str, impl Into<String>, &'static str),
        unit: &'static str,
        better: Better,
        ours: &[f64],
        (peer, theirs): (impl Into<String>, &[f64]),
    ) -> Self {
        let ratios: Vec<f64> = ours
            .iter()
            .zip(theirs)
            .map(|(ours, theirs)| match better {
                Better::Higher => ours / theirs,
                Better::Lower => theirs / ours,
            })
            .collect();
        let ratio = median(&ratios);
        let max = ratios.iter().copied().fold(f64::MIN, f64::max);
        let min = ratios.iter().copied().fold(f64::MAX, f64::min);
        Self {
            bench,
            case: case.into(),
            target,
            unit,
            ours: median(ours),
            peer: peer.into(),
            theirs: median(theirs),
            ratio,
            goal: None,
            runs: ratios.len(),
            spread: (max - min) / ratio,
            ratio_min: min,
            ratio_max: max,
            note: None,
        }
    }

    /// Sets the ratio that was asked for.
    #[must_use]
    pub fn goal(self, ratio: f64) -> Self {
        Self { goal: Some(ratio), ..self }
    }

    /// Sets the most that `ours` was to be, for what is better when lower.
    #[must_use]
    pub fn at_most(self, ours: f64) -> Self {
        let ratio = self.theirs / ours;
        self.goal(ratio)
    }

    /// Adds a note.
    #[must_use]
    pub fn note(mut self, note: impl Into<String>) -> Self {
        self.note = Some(note.into());
        self
    }

    /// Prints it: JSON, or a line for people.
    pub fn print(&self, json: bool) {
        if json {
            println!("{}", serde_json::to_string(self).unwrap_or_default());
        } else {
            println!(
                "{:<9} {:<38} {:<13} {:>12.1} {:<12} {} {:.1}: {:.2}x{} (spread {:.2}, {} runs){}",
                self.bench,
                self.case,
                self.target,
                self.ours,
                self.unit,
                self.peer,
                self.theirs,
                self.ratio,
                self.goal.map(|goal| format!(", goal {goal:.2}x")).unwrap_or_default(),
                self.spread,
                self.runs,
                self.note.as_ref().map(|note| format!("; {note}")).unwrap_or_default()
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratio_above_one_is_ours_better() {
        let id = ("b", "c", "userspace");
        let time = Record::new(id, "s", Better::Lower, &[1.0, 2.0, 1.0], ("p", &[2.0, 4.0, 2.0]));
        assert_eq!((time.ratio, time.ours, time.spread), (2.0, 1.0, 0.0));
        let rate = Record::new(id, "1/s", Better::Higher, &[3.0], ("p", &[2.0]));
        assert_eq!(rate.ratio, 1.5);
    }
}
