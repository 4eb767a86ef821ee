//! The order of a replay: which thread runs, and what each call is answered.
//!
//! Threads are threads of the process, so that a debugger shows them; one of them runs at a time. A thread that calls what
//! blocks waits until the next record is its own. Every call is compared with the recorded one.

use hypercall::layers::recorded::{Event, Record, SEED, digest, mix};
use hypercall::{Signal, UsbTransfer};
use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

thread_local! {
    /// The number of the thread in the recording.
    static THREAD: Cell<u32> = const { Cell::new(0) };
}

/// How a replay ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// With the recording.
    Complete,
    /// The domain called `exit` with this status.
    Exit(u64),
    /// At the call that was asked for.
    Reached,
    /// The component did something else than recorded.
    Diverged {
        /// What is recorded.
        expected: String,
        /// What was done.
        got: String,
    },
    /// A thread panicked.
    Panicked(String),
}

/// What a replay came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// How it ended.
    pub end: End,
    /// How many records were replayed.
    pub position: u64,
    /// The thread that ended it.
    pub thread: u32,
    /// Of all that the domain did and was told so far.
    pub hash: u64,
}

struct State {
    records: Vec<u8>,
    at: usize,
    next: Option<Record>,
    position: u64,
    /// The thread that runs.
    running: Option<u32>,
    /// Threads that wait for their turn.
    waiting: BTreeSet<u32>,
    hash: u64,
    /// By the numbers of the recording.
    signals: Vec<Option<Arc<Signal>>>,
    /// USB transfers that are submitted, by device and tag.
    transfers: BTreeMap<(u64, u64), UsbTransfer>,
    outcome: Option<Outcome>,
}

impl State {
    fn advance(&mut self) -> Option<Record> {
        let mut rest = self.records.get(self.at..).unwrap_or_default();
        let before = rest.len();
        let next = Record::take(&mut rest).ok();
        self.at += before - rest.len();
        let taken = std::mem::replace(&mut self.next, next)?;
        self.position += 1;
        Some(taken)
    }

    fn note(&mut self, event: Event, thread: u32, arguments: &[u64], record: &Record) {
        let head = [digest(event.name().as_bytes()), thread.into()];
        let numbers = head.iter().chain(arguments).chain(&record.results);
        self.hash = mix(numbers.fold(self.hash, |hash, number| mix(hash, *number)), digest(&record.data));
    }
}

/// A replay.
pub(super) struct Engine {
    state: Mutex<State>,
    changed: Condvar,
    until: Option<u64>,
    /// A debugger waits at [`anykernel_replay_stop`], so the replay goes on after it.
    debugged: bool,
}

/// Where a debugger stops: call `position` is about to return to the component, or the one after it is another than recorded.
#[unsafe(no_mangle)]
#[inline(never)]
#[expect(unsafe_code, reason = "a name that a debugger finds")]
pub extern "C" fn anykernel_replay_stop(position: u64) {
    // Something that the compiler may not leave out.
    std::hint::black_box(position);
}

/// A call as it is shown.
struct Shown<'a>(Event, u32, &'a [u64]);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}(", self.0.name())?;
        for (index, number) in self.2.iter().enumerate() {
            write!(f, "{}{number:#x}", if index > 0 { ", " } else { "" })?;
        }
        write!(f, ") by thread {}", self.1)
    }
}

impl Engine {
    pub(super) fn new(records: Vec<u8>, until: Option<u64>, debugged: bool) -> Self {
        let mut state = State {
            records,
            at: 0,
            next: None,
            position: 0,
            running: Some(0),
            waiting: BTreeSet::new(),
            hash: SEED,
            signals: Vec::new(),
            transfers: BTreeMap::new(),
            outcome: None,
        };
        state.advance();
        Self { state: Mutex::new(state), changed: Condvar::new(), until, debugged }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The first end counts.
    fn end(&self, state: &mut State, end: End) {
        let (position, hash, thread) = (state.position, state.hash, THREAD.get());
        state.outcome.get_or_insert(Outcome { end, position, thread, hash });
        self.changed.notify_all();
    }

    fn diverge(&self, state: &mut State, got: String) {
        let expected = match &state.next {
            Some(next) => Shown(next.event, next.thread, &next.arguments).to_string(),
            None => "nothing".into(),
        };
        self.end(state, End::Diverged { expected, got });
    }

    /// What a thread does when the replay is over: nothing any more.
    fn rest_for_ever(&self, state: MutexGuard<'_, State>) -> ! {
        drop(state);
        loop {
            std::thread::park();
        }
    }

    /// Waits until the replay is over.
    pub(super) fn wait(&self) -> Outcome {
        let mut state = self.lock();
        loop {
            match &state.outcome {
                Some(outcome) => return outcome.clone(),
                None => state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    /// A thread panicked.
    pub(super) fn panicked(&self, message: String) {
        self.end(&mut self.lock(), End::Panicked(message));
    }

    /// The domain ended itself.
    pub(super) fn exit(&self, status: u64) -> ! {
        let mut state = self.lock();
        self.end(&mut state, End::Exit(status));
        self.rest_for_ever(state)
    }

    /// Nobody runs: is there somebody who will?
    fn check_progress(&self, state: &mut State) {
        if state.running.is_some() || state.outcome.is_some() {
            return;
        }
        match &state.next {
            None => self.end(state, End::Complete),
            Some(next) if next.event == Event::Enter || state.waiting.contains(&next.thread) => {}
            Some(next) => {
                let got = format!("no thread {} that waits to go on", next.thread);
                self.diverge(state, got);
            }
        }
    }

    /// Gives up the right to run.
    fn release(&self, state: &mut State) {
        state.running = None;
        self.check_progress(state);
        self.changed.notify_all();
    }

    /// The calling thread does `event`: gives the record of it, in its turn.
    pub(super) fn step(&self, event: Event, blocks: bool, arguments: &[u64]) -> Record {
        let me = THREAD.get();
        let mut state = self.lock();
        if blocks {
            state = self.pass(state, me);
        }
        self.take(state, me, event, arguments)
    }

    /// Lets others run until the next record is this thread's.
    fn pass<'a>(&'a self, mut state: MutexGuard<'a, State>, me: u32) -> MutexGuard<'a, State> {
        state.waiting.insert(me);
        if state.running == Some(me) {
            self.release(&mut state);
        }
        let mine = |state: &State| {
            let next = state.next.as_ref();
            state.running.is_none()
                && next.is_some_and(|next| next.thread == me && next.event != Event::Enter)
        };
        while state.outcome.is_none() && !mine(&state) {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.waiting.remove(&me);
        state.running = Some(me);
        state
    }

    fn take<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        me: u32,
        event: Event,
        arguments: &[u64],
    ) -> Record {
        // What comes before the record of the call itself.
        while state.outcome.is_none() {
            match state.next.as_ref().filter(|next| next.thread == me).map(|next| next.event) {
                Some(Event::Raise) => {
                    if let Some(raised) = state.advance() {
                        self.raise(&mut state, &raised);
                    }
                }
                Some(Event::Preempt) => {
                    if let Some(preempted) = state.advance() {
                        state.note(Event::Preempt, me, &[], &preempted);
                    }
                    state = self.pass(state, me);
                }
                _ => break,
            }
        }
        if state.outcome.is_some() {
            self.rest_for_ever(state);
        }
        let fits = |next: &Record| next.event == event && next.thread == me && next.arguments == arguments;
        match &state.next {
            None => {
                self.end(&mut state, End::Complete);
                self.rest_for_ever(state)
            }
            Some(next) if !fits(next) => {
                self.diverge(&mut state, Shown(event, me, arguments).to_string());
                let position = state.position;
                if self.debugged {
                    drop(state);
                    anykernel_replay_stop(position);
                    state = self.lock();
                }
                self.rest_for_ever(state)
            }
            Some(_) => {}
        }
        let Some(record) = state.advance() else { self.rest_for_ever(state) };
        state.note(event, me, arguments, &record);
        if self.until == Some(state.position) {
            if !self.debugged {
                self.end(&mut state, End::Reached);
                self.rest_for_ever(state);
            }
            let position = state.position;
            drop(state);
            anykernel_replay_stop(position);
        }
        record
    }

    fn raise(&self, state: &mut State, record: &Record) {
        let [number, by] = record.results[..] else { return };
        let signal = usize::try_from(number).ok().and_then(|number| state.signals.get(number)?.clone());
        if let Some(signal) = signal {
            signal.advance(by as u32);
        }
        state.note(Event::Raise, record.thread, &[], record);
    }

    /// The host has the signal that the recording counts as `number`.
    pub(super) fn add_signal(&self, number: u64, signal: Arc<Signal>) {
        const MOST: usize = 1 << 16;
        let (mut state, number) = (self.lock(), number as usize);
        // As the recorder did.
        signal.advance(1);
        if number < MOST {
            let len = state.signals.len().max(number + 1);
            state.signals.resize(len, None);
            state.signals[number] = Some(signal);
        }
    }

    /// The transfers that the host has.
    pub(super) fn transfers<T>(&self, f: impl FnOnce(&mut BTreeMap<(u64, u64), UsbTransfer>) -> T) -> T {
        f(&mut self.lock().transfers)
    }

    /// Runs `body` as thread `thread`, from its first record to its last.
    pub(super) fn live(&self, thread: u32, body: impl FnOnce()) {
        THREAD.set(thread);
        self.step(Event::Begin, true, &[]);
        body();
        self.leave(Event::End);
    }

    /// Says that a thread waits to begin.
    pub(super) fn announce(&self, thread: u32) {
        self.lock().waiting.insert(thread);
    }

    /// The calling thread leaves the domain.
    pub(super) fn leave(&self, event: Event) {
        self.step(event, false, &[]);
        self.release(&mut self.lock());
    }

    /// Does what somebody outside did, whenever it was done, until the replay is over.
    pub(super) fn conduct(&self, action: impl Fn(u64)) {
        loop {
            let mut state = self.lock();
            let ours = |state: &State| {
                state.running.is_none() && state.next.as_ref().is_some_and(|next| next.event == Event::Enter)
            };
            while state.outcome.is_none() && !ours(&state) {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            let Some(next) = state.next.clone().filter(|_| state.outcome.is_none()) else { return };
            THREAD.set(next.thread);
            state.running = Some(next.thread);
            let record = self.take(state, next.thread, Event::Enter, &next.arguments);
            action(record.arguments.first().copied().unwrap_or(0));
            self.leave(Event::Leave);
        }
    }
}
