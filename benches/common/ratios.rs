//! Criterion measures; this notes what it measured, and says each ratio beside its target: both sides of one run.

use std::time::{Duration, Instant};

use super::is_test;
use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, SamplingMode};

/// A group of benchmarks that are compared with each other.
pub struct Ratios<'c> {
    name: String,
    group: BenchmarkGroup<'c, WallTime>,
    /// Name, and the seconds of each run, or of one of those at a turn.
    rows: Vec<(String, Vec<f64>)>,
    said: Vec<String>,
}

impl<'c> Ratios<'c> {
    /// For runs that take milliseconds and more.
    pub fn new(criterion: &'c mut Criterion, name: &str) -> Ratios<'c> {
        let mut group = criterion.benchmark_group(name);
        group
            .sampling_mode(SamplingMode::Flat)
            .sample_size(10)
            .warm_up_time(Duration::from_millis(100))
            .measurement_time(Duration::from_secs(2));
        Ratios { name: name.to_owned(), group, rows: Vec::new(), said: Vec::new() }
    }

    /// How long is measured, at least ten runs.
    pub fn measure_for(&mut self, time: Duration) {
        self.group.measurement_time(time);
    }

    /// `run` does it once and says how long it took: what comes before and after does not count.
    pub fn measure(&mut self, name: &str, mut run: impl FnMut() -> Duration) {
        self.measure_by_turns([(name, &mut run)]);
    }

    /// The same for several that are compared: what the machine does to one meanwhile it does to the others, so that their
    /// ratio is theirs.
    pub fn measure_by_turns<const N: usize>(&mut self, sides: [(&str, &mut dyn FnMut() -> Duration); N]) {
        self.take_turns(
            1,
            sides.map(|(name, run)| (name, move |times: u64| (0..times).map(|_| run()).sum())),
        );
    }

    /// The same for what takes too little time to be measured alone.
    pub fn measure_small<const N: usize>(&mut self, sides: [(&str, &mut dyn FnMut()); N]) {
        self.take_turns(
            100,
            sides.map(|(name, run)| {
                (name, move |times: u64| {
                    let began = Instant::now();
                    (0..times).for_each(|_| run());
                    began.elapsed()
                })
            }),
        );
    }

    /// Each does it so many times at a turn.
    fn take_turns<const N: usize>(
        &mut self,
        at_a_turn: u64,
        mut sides: [(&str, impl FnMut(u64) -> Duration); N],
    ) {
        let mut seconds = [const { Vec::new() }; N];
        for side in 0..N {
            self.group.bench_function(sides[side].0, |bencher| {
                bencher.iter_custom(|times| {
                    let mut took = [Duration::ZERO; N];
                    for begin in (0..times).step_by(at_a_turn as usize) {
                        let now = at_a_turn.min(times - begin);
                        for (turn, (_, run)) in sides.iter_mut().enumerate() {
                            let this = run(now);
                            took[turn] += this;
                            seconds[turn].push(this.as_secs_f64() / now as f64);
                        }
                    }
                    took[side]
                });
            });
        }
        self.rows.extend(sides.iter().map(|(name, _)| (*name).to_owned()).zip(seconds));
    }

    /// A line for the end, for what is counted and not timed.
    pub fn say(&mut self, line: String) {
        self.said.push(line);
    }

    /// What one run took, in the middle of all; none where the filter on the command line left it out.
    fn median(&self, name: &str) -> Option<f64> {
        let (_, seconds) = self.rows.iter().find(|(row, _)| row == name)?;
        median(seconds.clone())
    }

    /// `ours` in multiples of `floor`, of which `target` are allowed. One run of a test says nothing about that.
    pub fn compare(&mut self, ours: &str, floor: &str, target: f64) {
        if let Some(ratio) = self.ratio(ours, floor).filter(|_| !is_test()) {
            let verdict = if ratio <= target { "" } else { ": missed" };
            self.said.push(format!("{ours} / {floor} = {ratio:.2} (target {target}){verdict}"));
        }
    }

    /// The slow ones: of a hundred runs the slowest but one against that of the floor, of which `target` times and `slack` more
    /// are allowed.
    pub fn compare_slow(&mut self, ours: &str, floor: &str, target: f64, slack: Duration) {
        let slow = |name: &str| {
            let mut seconds = self.rows.iter().find(|(row, _)| row == name)?.1.clone();
            seconds.sort_by(f64::total_cmp);
            seconds.get(seconds.len().checked_sub(1)? * 99 / 100).copied()
        };
        let (Some(slow_ours), Some(slow_floor)) = (slow(ours), slow(floor)) else { return };
        let allowed = slow_floor * target + slack.as_secs_f64();
        let verdict = if is_test() || slow_ours <= allowed { "" } else { ": missed" };
        self.said.push(format!(
            "p99: {ours} {}, {floor} {} (target {target} times + {slack:?} = {}){verdict}",
            pretty(slow_ours),
            pretty(slow_floor),
            pretty(allowed)
        ));
    }

    /// The same without a target.
    pub fn relate(&mut self, ours: &str, floor: &str) {
        if let Some(ratio) = self.ratio(ours, floor) {
            self.said.push(format!("{ours} / {floor} = {ratio:.2}"));
        }
    }

    fn ratio(&self, ours: &str, floor: &str) -> Option<f64> {
        Some(self.median(ours)? / self.median(floor)?)
    }

    /// How many times as fast `ours` is.
    pub fn gain(&mut self, ours: &str, than: &str) {
        if let Some(ratio) = self.ratio(than, ours) {
            self.said.push(format!("{ours} is {ratio:.1} times as fast as {than}"));
        }
    }

    /// Says it all.
    pub fn finish(self) {
        println!("\n=== {}", self.name);
        for (name, seconds) in &self.rows {
            if let Some(median) = median(seconds.clone()) {
                println!("  {:<48} {:>12}", name, pretty(median));
            }
        }
        self.said.iter().for_each(|line| println!("  {line}"));
        println!();
        self.group.finish();
    }
}

pub fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

pub fn pretty(seconds: f64) -> String {
    match seconds {
        s if s < 1e-6 => format!("{:.1} ns", s * 1e9),
        s if s < 1e-3 => format!("{:.2} µs", s * 1e6),
        s if s < 1.0 => format!("{:.2} ms", s * 1e3),
        s => format!("{s:.2} s"),
    }
}
