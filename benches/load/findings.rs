//! The results of a run.

use serde::Serialize;

use crate::figures::{Cell, Ratio};
use crate::machine::Machine;
use crate::options::Options;

/// The results of a run, as `--json` writes them.
#[derive(Debug, Serialize)]
pub(crate) struct Findings {
    pub(crate) machine: Machine,
    pub(crate) options: Options,
    pub(crate) cells: Vec<Cell>,
    pub(crate) ratios: Vec<Ratio>,
}
