//! Draws `benches/plot.svg`: what one poll that finds a new block costs, in calls and in time, against the number of
//! escrows, for the three ways. From a run: `cargo bench --bench plot -- --draw`. Without `--draw` it does nothing, so
//! that `cargo bench` leaves the committed picture alone.

mod common;

use std::fmt::Write;
use std::path::Path;
use std::time::Instant;

use common::events::{approved, chain, released};
use common::naive;
use common::node::Node;
use common::ratios::median;
use common::{FAR, Reader, is_test, runtime, size};

const DRAW: &str = "--draw";
const BLOCKS: usize = 100;
const WAYS: [(&str, &str); 3] = [
    ("per escrow, one after the other", "sequential"),
    ("per escrow, 10 at once", "concurrent"),
    ("this relayer", "relayer"),
];

/// One poll of one way.
#[derive(Clone, Copy)]
struct Cost {
    calls: f64,
    seconds: f64,
}

/// What each of the ways costs with so many escrows.
struct Measured {
    escrows: usize,
    costs: [Cost; 3],
}

fn measure(escrows: usize) -> Measured {
    let node = Node::start(chain(escrows, BLOCKS), 10);
    let (http, runtime, url) = (reqwest::Client::new(), runtime(), node.url());
    let mut reader = Reader::new(&node);
    node.set_latency(FAR);
    let poll = naive::requests(escrows, BLOCKS as u64, BLOCKS as u64);
    let cost = |runs: usize, run: &mut dyn FnMut() -> f64| {
        // Once for the connection, where that counts.
        if runs > 1 {
            run();
        }
        node.take_counts();
        let seconds = median((0..runs).map(|_| run()).collect()).expect("there are runs");
        Cost { calls: node.take_counts().calls as f64 / runs as f64, seconds }
    };
    let per_escrow = |concurrent| {
        let began = Instant::now();
        runtime.block_on(naive::fetch(&http, &url, &poll, concurrent));
        began.elapsed().as_secs_f64()
    };
    let mut number = 0;
    let mut relayer = || {
        number += 1;
        node.extend(vec![approved(number % escrows), released((number + 1) % escrows)]);
        reader.new_block().as_secs_f64()
    };
    // A minute each would teach nothing.
    let runs = if escrows > 100 || is_test() { 1 } else { 3 };
    let costs = [
        cost(runs, &mut || per_escrow(1)),
        cost(runs, &mut || per_escrow(10)),
        cost(size(15, 1), &mut relayer),
    ];
    Measured { escrows, costs }
}

fn main() {
    let draw = std::env::args().any(|argument| argument == DRAW);
    if !draw && !is_test() {
        println!("cargo bench --bench plot -- {DRAW}: draws benches/plot.svg anew");
        return;
    }
    let sizes: &[usize] = if is_test() { &[1, 10] } else { &[1, 10, 100, 1000] };
    let mut all = Vec::new();
    for escrows in sizes {
        let measured = measure(*escrows);
        for ((name, _), cost) in WAYS.iter().zip(&measured.costs) {
            println!("{escrows:>5} escrows, {name:<32} {:>7.1} calls {:>9.4} s", cost.calls, cost.seconds);
        }
        all.push(measured);
    }
    let svg = picture(&all);
    if draw {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/plot.svg");
        std::fs::write(&path, svg).expect("the picture can be written");
        println!("{}", path.display());
    }
}

// ---- the picture

const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 380.0;
/// Of one of the two plots.
const PLOT: (f64, f64) = (290.0, 240.0);
const TOP: f64 = 64.0;

/// One plot: both axes logarithmic.
struct Axes {
    left: f64,
    /// Powers of ten.
    x: (i32, i32),
    y: (i32, i32),
}

impl Axes {
    fn x(&self, value: f64) -> f64 {
        let (low, high) = self.x;
        self.left + PLOT.0 * (value.log10() - f64::from(low)) / f64::from(high - low)
    }

    fn y(&self, value: f64) -> f64 {
        let (low, high) = self.y;
        TOP + PLOT.1 * (1.0 - (value.log10() - f64::from(low)) / f64::from(high - low))
    }
}

fn picture(all: &[Measured]) -> String {
    let mut svg = String::new();
    put(
        &mut svg,
        format_args!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" width=\"{WIDTH}\" height=\"{HEIGHT}\" \
         role=\"img\" aria-label=\"Calls and time of one poll against the number of escrows\">"
        ),
    );
    svg.push_str(STYLE);
    put(
        &mut svg,
        format_args!(
            "<text class=\"title\" x=\"20\" y=\"26\">One poll that finds a new block; the node is {} ms away</text>",
            FAR.as_millis()
        ),
    );
    plot(&mut svg, all, 70.0, &Quantity { label: "JSON-RPC calls", of: |cost| cost.calls, say: whole });
    plot(&mut svg, all, 500.0, &Quantity { label: "time", of: |cost| cost.seconds, say: time });
    legend(&mut svg);
    svg.push_str("</svg>\n");
    svg
}

/// Readable on white and on black: the colours of what is written follow the reader's scheme.
const STYLE: &str = "<style>\
    text{font:12px system-ui,sans-serif;fill:#24292f}.title{font-size:15px;font-weight:600}.label{font-weight:600}\
    .grid{stroke:#8c959f;stroke-opacity:.35}.line{fill:none;stroke-width:2.5}\
    .sequential{stroke:#cf222e;fill:#cf222e}.concurrent{stroke:#bf8700;fill:#bf8700}.relayer{stroke:#1a7f37;fill:#1a7f37}\
    .line.sequential,.line.concurrent,.line.relayer{fill:none}.line.concurrent{stroke-dasharray:8 6}\
    text.sequential,text.concurrent,text.relayer{stroke:none}\
    @media(prefers-color-scheme:dark){text{fill:#e6edf3}\
    .sequential{stroke:#ff7b72;fill:#ff7b72}.concurrent{stroke:#e3b341;fill:#e3b341}.relayer{stroke:#56d364;fill:#56d364}}\
    </style>";

/// What goes upwards.
struct Quantity {
    label: &'static str,
    of: fn(&Cost) -> f64,
    say: fn(f64) -> String,
}

fn plot(svg: &mut String, all: &[Measured], left: f64, quantity: &Quantity) {
    let values: Vec<f64> = all.iter().flat_map(|measured| measured.costs.iter().map(quantity.of)).collect();
    let power = |value: f64, round: fn(f64) -> f64| round(value.log10()) as i32;
    let lowest = values.iter().copied().fold(f64::INFINITY, f64::min);
    let highest = values.iter().copied().fold(0.0, f64::max);
    let most = all.last().map_or(10, |measured| measured.escrows) as f64;
    let axes = Axes {
        left,
        x: (0, power(most, f64::ceil)),
        y: (power(lowest, f64::floor), power(highest, f64::ceil)),
    };
    grid(svg, &axes, quantity);
    for (way, (_, class)) in WAYS.iter().enumerate() {
        let points: Vec<(f64, f64)> = all
            .iter()
            .map(|measured| (axes.x(measured.escrows as f64), axes.y((quantity.of)(&measured.costs[way]))))
            .collect();
        let line: Vec<String> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        put(svg, format_args!("<polyline class=\"line {class}\" points=\"{}\"/>", line.join(" ")));
        // Where two ways cost the same, both are to be seen.
        let radius = 5.0 - way as f64;
        for (x, y) in &points {
            put(svg, format_args!("<circle class=\"{class}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"{radius}\"/>"));
        }
        let (Some((x, y)), Some(last)) = (points.last(), all.last()) else { continue };
        let said = (quantity.say)((quantity.of)(&last.costs[way]));
        put(svg, format_args!("<text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"end\">{said}</text>", y - 9.0));
    }
}

fn grid(svg: &mut String, axes: &Axes, quantity: &Quantity) {
    let (right, bottom) = (axes.left + PLOT.0, TOP + PLOT.1);
    for power in axes.x.0..=axes.x.1 {
        let x = axes.x(10f64.powi(power));
        put(svg, format_args!("<path class=\"grid\" d=\"M{x:.1} {TOP}V{bottom}\"/>"));
        let name = whole(10f64.powi(power));
        put(
            svg,
            format_args!("<text x=\"{x:.1}\" y=\"{}\" text-anchor=\"middle\">{name}</text>", bottom + 18.0),
        );
    }
    for power in axes.y.0..=axes.y.1 {
        let y = axes.y(10f64.powi(power));
        put(svg, format_args!("<path class=\"grid\" d=\"M{} {y:.1}H{right}\"/>", axes.left));
        let (x, y, name) = (axes.left - 8.0, y + 4.0, (quantity.say)(10f64.powi(power)));
        put(svg, format_args!("<text x=\"{x}\" y=\"{y:.1}\" text-anchor=\"end\">{name}</text>"));
    }
    put(
        svg,
        format_args!(
            "<text class=\"label\" x=\"{}\" y=\"{}\">{}</text>",
            axes.left,
            TOP - 12.0,
            quantity.label
        ),
    );
    let (x, y) = (axes.left + PLOT.0 / 2.0, bottom + 36.0);
    put(svg, format_args!("<text x=\"{x}\" y=\"{y}\" text-anchor=\"middle\">escrows</text>"));
}

fn legend(svg: &mut String) {
    let mut x = 70.0;
    for (name, class) in WAYS {
        let y = HEIGHT - 12.0;
        put(svg, format_args!("<circle class=\"{class}\" cx=\"{x}\" cy=\"{}\" r=\"5\"/>", y - 4.0));
        put(svg, format_args!("<text x=\"{}\" y=\"{y}\">{name}</text>", x + 12.0));
        x += 260.0;
    }
}

fn time(seconds: f64) -> String {
    match seconds {
        s if s < 1.0 => format!("{:.0} ms", s * 1e3),
        s if s < 10.0 => format!("{s:.1} s").replace(".0 ", " "),
        s => format!("{s:.0} s"),
    }
}

/// With commas.
fn whole(value: f64) -> String {
    let digits = format!("{value:.0}");
    match digits.len() {
        ..=3 => digits,
        length => format!("{},{}", &digits[..length - 3], &digits[length - 3..]),
    }
}

fn put(svg: &mut String, text: std::fmt::Arguments<'_>) {
    svg.write_fmt(text).expect("writing to memory");
    svg.push('\n');
}
