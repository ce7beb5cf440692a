//! Heat maps as PNG files.

mod canvas;
mod heatmap;

pub(crate) use heatmap::{Axis, Figure, Panel, Scale};
