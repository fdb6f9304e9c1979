//! The plots of one scenario, as SVG.

use anyhow::{Result, anyhow};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::figures::Cell;
use crate::kind::Kind;
use crate::number::float;

const FONT: &str = "sans-serif";

fn colour(kind: Kind) -> RGBColor {
    match kind {
        Kind::InMemory => RGBColor(150, 150, 150),
        Kind::Mongo => RGBColor(214, 150, 60),
        Kind::Naive => RGBColor(190, 70, 70),
        Kind::Ours => RGBColor(40, 110, 190),
        Kind::Compact => RGBColor(60, 160, 120),
    }
}

/// A bar for each store: its throughput.
pub(crate) fn throughput(cells: &[&Cell]) -> Result<String> {
    const BAR: u32 = 34;

    let mut svg = String::new();
    let height = BAR * u32::try_from(cells.len())? + 30;
    {
        let root = SVGBackend::with_string(&mut svg, (430, height)).into_drawing_area();
        root.fill(&WHITE).map_err(odd)?;
        let most = cells.iter().map(|cell| cell.throughput).fold(1.0, f64::max);
        let rows = float(cells.len() as u64);
        let mut chart = ChartBuilder::on(&root)
            .margin_right(30)
            .margin_left(5)
            .margin_top(5)
            .x_label_area_size(24)
            .build_cartesian_2d(0.0..most, 0.0..rows)
            .map_err(odd)?;
        chart
            .configure_mesh()
            .disable_y_mesh()
            .disable_y_axis()
            .x_labels(5)
            .light_line_style(TRANSPARENT)
            .x_label_style((FONT, 12))
            .x_label_formatter(&|value| count(*value))
            .draw()
            .map_err(odd)?;
        let text = (FONT, 13).into_font().into_text_style(&root);
        let text = text.pos(Pos::new(HPos::Left, VPos::Center));
        for (row, cell) in cells.iter().rev().enumerate() {
            let low = float(row as u64);
            let bar = [(0.0, low + 0.1), (cell.throughput, low + 0.9)];
            let fill = colour(cell.store).mix(0.45).filled();
            let said = format!("{}  {}/s", cell.store.title(), count(cell.throughput));
            chart.draw_series([Rectangle::new(bar, fill)]).map_err(odd)?;
            let label = EmptyElement::at((0.0, low + 0.5)) + Text::new(said, (8, 0), text.clone());
            chart.draw_series([label]).map_err(odd)?;
        }
        root.present().map_err(odd)?;
    }
    Ok(svg)
}

/// A line for each store: which share of the requests took at most how long.
pub(crate) fn latency(cells: &[&Cell]) -> Result<String> {
    let points = |cell: &Cell| -> Vec<(f64, f64)> {
        let curve = cell.latency_micros.curve.iter();
        curve.map(|(share, micros)| (-(1.0 - share).log10(), micros.max(1.0))).collect()
    };
    let all: Vec<_> = cells.iter().flat_map(|cell| points(cell)).collect();
    let nines = all.iter().map(|point| point.0).fold(1.0, f64::max);
    let lowest = all.iter().map(|point| point.1).fold(1e6, f64::min);
    let highest = all.iter().map(|point| point.1).fold(10.0, f64::max);
    let lowest = decade(lowest.log10().floor());
    let highest = decade(highest.log10().ceil());
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (560, 260)).into_drawing_area();
        root.fill(&WHITE).map_err(odd)?;
        let mut chart = ChartBuilder::on(&root)
            .margin_right(20)
            .margin_top(8)
            .x_label_area_size(24)
            .y_label_area_size(64)
            .build_cartesian_2d(0.0..nines, (lowest..highest).log_scale())
            .map_err(odd)?;
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .label_style((FONT, 12))
            .x_labels(6)
            .y_labels(4)
            .x_label_formatter(&|nines| share(*nines))
            .y_label_formatter(&|micros| time(*micros))
            .draw()
            .map_err(odd)?;
        for cell in cells {
            let colour = colour(cell.store);
            chart
                .draw_series(LineSeries::new(points(cell), colour.stroke_width(2)))
                .map_err(odd)?
                .label(cell.store.title())
                .legend(move |(x, y)| {
                    PathElement::new([(x, y), (x + 14, y)], colour.stroke_width(2))
                });
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::LowerRight)
            .background_style(WHITE.mix(0.8))
            .label_font((FONT, 12))
            .draw()
            .map_err(odd)?;
        root.present().map_err(odd)?;
    }
    Ok(svg)
}

fn decade(power: f64) -> f64 {
    10.0_f64.powf(power)
}

fn share(nines: f64) -> String {
    let percent = 100.0 * (1.0 - decade(-nines));
    let digits = if nines > 2.5 { 2 } else { usize::from(nines > 1.2) };
    format!("{percent:.digits$} %")
}

fn time(micros: f64) -> String {
    if micros < 1_000.0 {
        format!("{micros:.0} µs")
    } else {
        format!("{:.0} ms", micros / 1_000.0)
    }
}

fn count(value: f64) -> String {
    if value < 10_000.0 { format!("{value:.0}") } else { format!("{:.1} k", value / 1_000.0) }
}

/// Converts an error of the plot library, which borrows its arguments.
fn odd(error: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("draw a plot: {error}")
}
