//! Records as a picture: one row a case, a bar from 1 (as good as the peer) to the ratio, on a logarithmic scale.

use crate::record::Record;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use std::path::Path;

const WIDTH: u32 = 1120;
const ROW: u32 = 44;
/// Above the first row: title, explanation, scale.
const TOP: u32 = 104;
const BOTTOM: u32 = 20;
/// Columns: what was measured, the bars, the figures.
const LABELS: u32 = 350;
const FIGURES: u32 = 270;

const FONT: &str = "sans-serif";
const INK: RGBColor = RGBColor(34, 34, 34);
const QUIET: RGBColor = RGBColor(110, 110, 110);
const GRID: RGBColor = RGBColor(224, 224, 224);
const GOOD: RGBColor = RGBColor(74, 144, 100);
const SHORT: RGBColor = RGBColor(203, 96, 72);

fn text(size: u32, color: RGBColor, side: HPos) -> TextStyle<'static> {
    (FONT, size).into_font().color(&color).pos(Pos::new(side, VPos::Center))
}

/// Three digits, with a unit prefix: `18.4 k`.
fn short(value: f64) -> String {
    let (scaled, prefix) = match value.abs() {
        1e9.. => (value / 1e9, " G"),
        1e6.. => (value / 1e6, " M"),
        1e4.. => (value / 1e3, " k"),
        _ => (value, ""),
    };
    let digits = match scaled.abs() {
        100.0.. => 0,
        10.0.. => 1,
        _ => 2,
    };
    let text = format!("{scaled:.digits$}");
    let text = if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { &text };
    format!("{text}{prefix}")
}

/// The range of the scale: around 1, and with room for every whisker and goal. Both ends are steps.
fn range(records: &[Record]) -> (f64, f64) {
    let values = records.iter().flat_map(|r| [r.ratio_min, r.ratio_max, r.ratio, r.goal.unwrap_or(1.0)]);
    let values = values.filter(|value| value.is_finite() && *value > 0.0);
    let (low, high) = values.fold((0.8f64, 1.25f64), |(low, high), value| (low.min(value), high.max(value)));
    (low / 1.1, high * 1.1)
}

/// 1, 2 and 5 times powers of ten, fewer of them on a long scale.
fn steps((low, high): (f64, f64)) -> Vec<f64> {
    let mantissas: &[f64] = if high / low > 1000.0 { &[1.0] } else { &[1.0, 2.0, 5.0] };
    let powers = low.log10().floor() as i32..=high.log10().ceil() as i32;
    let all = powers.flat_map(|power| mantissas.iter().map(move |step| step * 10f64.powi(power)));
    all.filter(|step| (low..=high).contains(step)).collect()
}

/// Draws the records of one benchmark to `DIR/NAME.svg`.
pub fn draw(records: &[Record], dir: &Path) -> Result<std::path::PathBuf, String> {
    let Some(first) = records.first() else { return Err("there is nothing to draw".into()) };
    let path = dir.join(format!("{}.svg", first.bench));
    let told = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
    std::fs::create_dir_all(dir).map_err(|error| told(&error))?;
    let height = TOP + ROW * records.len() as u32 + BOTTOM;
    let backend = SVGBackend::new(&path, (WIDTH, height));
    picture(records, &backend.into_drawing_area()).map_err(|error| told(&error))?;
    Ok(path)
}

fn picture<B: DrawingBackend>(
    records: &[Record],
    root: &DrawingArea<B, plotters::coord::Shift>,
) -> Result<(), DrawingAreaErrorKind<B::ErrorType>> {
    root.fill(&WHITE)?;
    let bench = records[0].bench;
    let put = |at: (i32, i32), words: &str, style: TextStyle<'static>| {
        root.draw(&Text::new(words.to_string(), at, style))
    };
    put((16, 22), &format!("cargo xtask bench {bench}"), text(20, INK, HPos::Left))?;
    let explanation = "Ratio to the peer of the same run, more is better. Bar: median; whisker: all runs; dark mark: the goal. Right: ours : theirs.";
    put((16, 48), explanation, text(13, QUIET, HPos::Left))?;

    let (left, right) = (LABELS as i32, (WIDTH - FIGURES) as i32);
    let (low, high) = range(records);
    let x = |ratio: f64| {
        let part = (ratio.clamp(low, high) / low).ln() / (high / low).ln();
        left + (part * f64::from(right - left)).round() as i32
    };
    let bottom = (TOP + ROW * records.len() as u32) as i32;
    for step in steps((low, high)) {
        let color = if step == 1.0 { QUIET } else { GRID };
        root.draw(&PathElement::new([(x(step), TOP as i32 - 8), (x(step), bottom)], color))?;
        put((x(step), TOP as i32 - 18), &format!("{}×", short(step)), text(12, QUIET, HPos::Center))?;
    }
    for (row, record) in records.iter().enumerate() {
        let middle = TOP as i32 + (ROW as i32) * row as i32 + ROW as i32 / 2;
        put((left - 14, middle - 8), &record.case, text(14, INK, HPos::Right))?;
        let against = format!("{} / {}", record.target, record.peer);
        put((left - 14, middle + 9), &against, text(12, QUIET, HPos::Right))?;

        let color = if record.ratio >= record.goal.unwrap_or(1.0) { GOOD } else { SHORT };
        let ends = [(x(1.0), middle - 9), (x(record.ratio), middle + 9)];
        root.draw(&Rectangle::new(ends, color.filled()))?;
        let (least, most) = (x(record.ratio_min), x(record.ratio_max));
        if most > least {
            root.draw(&PathElement::new([(least, middle), (most, middle)], INK))?;
            for end in [least, most] {
                root.draw(&PathElement::new([(end, middle - 4), (end, middle + 4)], INK))?;
            }
        }
        if let Some(goal) = record.goal {
            let line = [(x(goal), middle - 15), (x(goal), middle + 15)];
            root.draw(&PathElement::new(line, INK.stroke_width(3)))?;
        }
        let goal = record.goal.map(|goal| format!(" (goal {}×)", short(goal))).unwrap_or_default();
        put((right + 16, middle - 8), &format!("{}×{goal}", short(record.ratio)), text(14, INK, HPos::Left))?;
        let figures = format!("{} : {} {}", short(record.ours), short(record.theirs), record.unit);
        put((right + 16, middle + 9), &figures, text(12, QUIET, HPos::Left))?;
    }
    root.present()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Better;

    fn record(ours: f64) -> Record {
        Record::new(("b", "a <case> & more", "userspace"), "MB/s", Better::Higher, &[ours], ("p", &[2.0]))
            .goal(0.77)
    }

    #[test]
    fn every_record_has_its_row() {
        let dir = std::env::temp_dir().join(format!("anykernel-plot-{}", std::process::id()));
        let path = draw(&[record(1.0), record(40_000.0)], &dir).unwrap();
        let svg = std::fs::read_to_string(&path).unwrap();
        std::fs::remove_dir_all(&dir).unwrap();
        assert_eq!(svg.matches("a &lt;case&gt; &amp; more").count(), 2);
        assert!(svg.contains("20 k×") && svg.contains("0.5× (goal 0.77×)"), "{svg}");
        assert!(draw(&[], &dir).is_err());
    }

    #[test]
    fn numbers_are_short() {
        let shown: Vec<_> = [0.77, 1.0, 12.345, 0.05, 18_409.0, 1_500_000.0, 999.6].map(short).into();
        assert_eq!(shown, ["0.77", "1", "12.3", "0.05", "18.4 k", "1.5 M", "1000"]);
    }

    #[test]
    fn the_scale_is_never_empty() {
        assert!(steps((0.7, 1.4)).contains(&1.0));
        assert_eq!(steps((0.01, 100.0)).len(), 5);
    }
}
