//! The report: one HTML file that loads nothing else.

use std::fmt::Write;

use anyhow::Result;

use crate::figures::Cell;
use crate::findings::Findings;
use crate::{machine, plot, table};

const STYLE: &str = "\
body { font: 15px/1.45 sans-serif; color: #222; max-width: 1080px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin: 2em 0 .3em }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
td, th { padding: 2px 8px; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
td:first-child, th:first-child, .facts td { text-align: left } .facts td { white-space: normal }
.wide { overflow-x: auto } .plots { display: flex; flex-wrap: wrap; gap: 16px; align-items: end }
figure { margin: .5em 0 } figcaption { font-size: 13px; color: #555 }
.short, .wrong { color: #b00020; font-weight: bold } pre { white-space: pre-wrap }";

pub(crate) fn of(findings: &Findings) -> Result<String> {
    let mut html = String::new();
    write!(
        html,
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n\
         <title>Load test of session stores</title><style>\n{STYLE}\n</style></head><body>\n\
         <h1>Load test of session stores</h1>\n"
    )?;
    let facts = findings.machine.lines();
    let facts = facts.iter().map(|(what, text)| vec![(*what).to_owned(), text.clone()]);
    let facts: Vec<_> = [vec![String::new(); 2]].into_iter().chain(facts).collect();
    html.push_str("<div class=\"facts\">\n");
    rows(&mut html, &facts)?;
    html.push_str("</div>\n");
    if !machine::is_optimised() {
        html.push_str(
            "<p class=\"wrong\">Debug assertions are on: these figures say nothing about speed.</p>\n",
        );
    }
    html.push_str("<h2>Ratios of medians</h2>\n");
    rows(&mut html, &table::ratios(&findings.ratios))?;
    for line in table::goals(&findings.ratios).iter().filter(|_| machine::is_optimised()) {
        let class = if line.ends_with("short") { "short" } else { "ok" };
        writeln!(html, "<div class=\"{class}\">{}</div>", escaped(line))?;
    }
    for cells in findings.cells.chunk_by(|one, next| one.scenario == next.scenario) {
        section(&mut html, &cells.iter().collect::<Vec<_>>())?;
    }
    write!(html, "<h2>How to read it</h2>\n<pre>{}</pre>\n", escaped(table::LEGEND))?;
    let options = serde_json::to_string_pretty(&findings.options)?;
    write!(html, "<h2>Settings</h2>\n<pre>{}</pre>\n</body></html>\n", escaped(&options))?;
    Ok(html)
}

/// One scenario: plots and table.
fn section(html: &mut String, cells: &[&Cell]) -> Result<()> {
    let scenario = cells[0].scenario;
    write!(
        html,
        "<h2>{}: {}</h2>\n<div class=\"plots\">\
         <figure><figcaption>Requests a second</figcaption>{}</figure>\
         <figure><figcaption>Share of the requests that took at most this long</figcaption>{}</figure></div>\n",
        scenario.key(),
        escaped(scenario.about()),
        plot::throughput(cells)?,
        plot::latency(cells)?
    )?;
    rows(html, &table::figures(cells.iter().copied()))?;
    for cell in cells {
        for text in &cell.wrong_answers {
            let title = cell.store.title();
            writeln!(html, "<div class=\"wrong\">wrong, {title}: {}</div>", escaped(text))?;
        }
    }
    Ok(())
}

/// A table. Its first line is the head.
fn rows(html: &mut String, lines: &[Vec<String>]) -> Result<()> {
    html.push_str("<div class=\"wide\"><table>\n");
    for (index, line) in lines.iter().enumerate() {
        let tag = if index == 0 { "th" } else { "td" };
        html.push_str("<tr>");
        for text in line {
            write!(html, "<{tag}>{}</{tag}>", escaped(text))?;
        }
        html.push_str("</tr>\n");
    }
    html.push_str("</table></div>\n");
    Ok(())
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
