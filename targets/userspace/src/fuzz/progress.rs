//! What a person, or a program, sees meanwhile.

use super::worker::Status;
use indicatif::{ProgressBar, ProgressStyle};
use std::time::{Duration, Instant};

/// Lines for a person come at most this often.
const LINE: Duration = Duration::from_secs(5);
const OBJECT: Duration = Duration::from_secs(1);

/// How to show it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Show {
    /// A live screen on standard error.
    Screen,
    /// Plain lines on standard error.
    Lines,
    /// One object a line on standard output.
    Json,
}

#[derive(Debug, Clone, Copy, Default)]
struct One {
    now: Status,
    /// Of processes before this one.
    before: u64,
}

/// The numbers of all workers.
pub(super) struct Progress {
    target: String,
    workers: Vec<One>,
    show: Show,
    bar: ProgressBar,
    start: Instant,
    shown: Option<Instant>,
    found: Option<Instant>,
    crashes: usize,
    distinct: usize,
    /// When, and how many executions there were, some seconds ago.
    window: std::collections::VecDeque<(Instant, u64)>,
}

impl Progress {
    pub(super) fn new(target: &str, workers: usize, show: Show) -> Self {
        let bar = if show == Show::Screen { ProgressBar::new_spinner() } else { ProgressBar::hidden() };
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg}") {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(200));
        Self {
            target: target.into(),
            workers: vec![One::default(); workers],
            show,
            bar,
            start: Instant::now(),
            // Lines begin when there is something to tell; a short run has only its last one.
            shown: (show == Show::Lines).then(Instant::now),
            found: None,
            crashes: 0,
            distinct: 0,
            window: Default::default(),
        }
    }

    pub(super) fn update(&mut self, worker: usize, status: Status) {
        if status.new {
            self.found = Some(Instant::now());
        }
        if let Some(one) = self.workers.get_mut(worker) {
            let before = one.now;
            one.now = status;
            one.now.coverage = status.coverage.max(before.coverage);
            one.now.features = status.features.max(before.features);
            one.now.corpus = if status.corpus == 0 { before.corpus } else { status.corpus };
        }
        self.show();
    }

    pub(super) fn crash(&mut self) {
        self.crashes += 1;
    }

    pub(super) fn distinct(&mut self, distinct: usize) {
        self.distinct = distinct;
    }

    pub(super) fn restarted(&mut self, worker: usize) {
        if let Some(one) = self.workers.get_mut(worker) {
            one.before += one.now.executions;
            one.now.executions = 0;
        }
    }

    pub(super) fn executions(&self) -> u64 {
        self.workers.iter().map(|one| one.before + one.now.executions).sum()
    }

    pub(super) fn coverage(&self) -> u64 {
        self.workers.iter().map(|one| one.now.coverage).max().unwrap_or(0)
    }

    fn most(&self, of: impl Fn(&Status) -> u64) -> u64 {
        self.workers.iter().map(|one| of(&one.now)).max().unwrap_or(0)
    }

    /// Executions per second, of the last ten seconds.
    fn rate(&mut self) -> u64 {
        let (now, executions) = (Instant::now(), self.executions());
        self.window.push_back((now, executions));
        while self.window.len() > 2
            && self.window.front().is_some_and(|(at, _)| now - *at > Duration::from_secs(10))
        {
            self.window.pop_front();
        }
        let (at, before) = self.window.front().copied().unwrap_or((self.start, 0));
        let elapsed = (now - at).as_secs_f64();
        if elapsed < 0.5 { 0 } else { (executions.saturating_sub(before) as f64 / elapsed) as u64 }
    }

    /// A line of its own.
    pub(super) fn say(&self, text: &str) {
        match self.show {
            Show::Screen => self.bar.println(text),
            _ => eprintln!("{text}"),
        }
    }

    /// Shows it, if it is time.
    pub(super) fn show(&mut self) {
        let every = match self.show {
            Show::Screen => Duration::from_millis(200),
            Show::Lines => LINE,
            Show::Json => OBJECT,
        };
        if self.shown.is_some_and(|at| at.elapsed() < every) {
            return;
        }
        self.shown = Some(Instant::now());
        self.print();
    }

    fn print(&mut self) {
        let rate = self.rate();
        let (executions, seconds) = (self.executions(), self.start.elapsed().as_secs());
        let since = self.found.map_or(seconds, |at| at.elapsed().as_secs());
        let (coverage, features, corpus) =
            (self.coverage(), self.most(|status| status.features), self.most(|status| status.corpus));
        let (target, workers, crashes, distinct) =
            (&self.target, self.workers.len(), self.crashes, self.distinct);
        match self.show {
            Show::Json => println!(
                "{}",
                serde_json::json!({
                    "target": target, "seconds": seconds, "workers": workers, "executions": executions,
                    "executions_per_second": rate, "coverage": coverage, "features": features, "corpus": corpus,
                    "crashes": crashes, "distinct": distinct, "seconds_since_find": since,
                })
            ),
            Show::Screen => self.bar.set_message(format!(
                "{target}: {seconds} s, {workers} workers\n  {rate} executions/s, {executions} in all\n  coverage {coverage} \
                 edges, {features} features, corpus {corpus}, last find {since} s ago\n  crashes {crashes}, {distinct} distinct"
            )),
            Show::Lines => eprintln!(
                "{target}: {seconds} s, {executions} executions, {rate}/s, coverage {coverage}, corpus {corpus}, crashes \
                 {crashes} ({distinct} distinct), last find {since} s ago"
            ),
        }
    }

    pub(super) fn finish(&mut self, elapsed: Duration) {
        if self.show == Show::Json {
            return self.print();
        }
        self.bar.finish_and_clear();
        eprintln!(
            "{}: {} executions in {} s, {} edges reached, {} crashes, {} distinct",
            self.target,
            self.executions(),
            elapsed.as_secs(),
            self.coverage(),
            self.crashes,
            self.distinct
        );
    }
}
