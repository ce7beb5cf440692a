//! Panels of coloured cells with titles, axes and colour scales, side by side.

use super::canvas::{Anchor, Canvas, Colour, FRAME};
use crate::error::Result;
use std::path::Path;

/// Pixels that a panel's longer side should have.
const PANEL: usize = 420;
/// The same where cells are countable things, of which there are few.
const WIDE_PANEL: usize = 720;
/// Cells of a panel side before they are merged.
const MOST: usize = 900;
/// What a cell without a value looks like.
const NOTHING: Colour = [236, 236, 240];
const SMALL: (f32, bool) = (12.0, false);

/// What the colours of a panel mean.
#[derive(Debug, Clone)]
pub(crate) enum Scale {
    /// 0 pale, 1 dark; the words say what they are.
    Binary { one: &'static str, zero: &'static str },
    /// Shares from 10^`from` to 1 on a logarithmic scale.
    Log { from: i32, label: &'static str },
    /// Shares from 0 to 1.
    Linear { label: &'static str },
    /// Values from 0 to `most`.
    UpTo { most: f32, label: &'static str },
}

/// An axis: what it counts, and how much a cell stands for.
#[derive(Debug, Clone)]
pub(crate) struct Axis {
    pub(crate) label: &'static str,
    /// Units per cell.
    pub(crate) step: usize,
    /// Units in all (the last cell may be short).
    pub(crate) end: usize,
}

/// A grid of cells, NaN where there is no value.
#[derive(Debug, Clone)]
pub(crate) struct Panel {
    pub(crate) title: String,
    pub(crate) rows: Axis,
    pub(crate) columns: Axis,
    /// `[rows, columns]`.
    pub(crate) values: Vec<f32>,
    pub(crate) scale: Scale,
    /// Height of a cell over its width.
    pub(crate) aspect: usize,
}

/// Panels side by side under a title.
#[derive(Debug, Clone)]
pub(crate) struct Figure {
    pub(crate) title: String,
    pub(crate) subtitle: String,
    pub(crate) panels: Vec<Panel>,
}

/// A panel's cells in pixels.
struct Grid {
    rows: usize,
    columns: usize,
    /// Pixels per cell, or cells per pixel.
    zoom: Zoom,
    width: usize,
    height: usize,
}

#[derive(Clone, Copy)]
enum Zoom {
    In { w: usize, h: usize },
    Out { columns: usize, rows: usize },
}

impl Panel {
    fn grid(&self) -> Grid {
        let rows = self.rows.end.div_ceil(self.rows.step).max(1);
        let columns = self.columns.end.div_ceil(self.columns.step).max(1);
        let longer = columns.max(rows * self.aspect);
        if longer > MOST {
            let merge = longer.div_ceil(MOST);
            let zoom = Zoom::Out { columns: merge, rows: (merge / self.aspect).max(1) };
            let Zoom::Out { columns: c, rows: r } = zoom else { unreachable!() };
            return Grid {
                rows,
                columns,
                zoom,
                width: columns.div_ceil(c),
                height: rows.div_ceil(r),
            };
        }
        let target = if self.columns.step == 1 { WIDE_PANEL } else { PANEL };
        let w = (target / longer).clamp(1, 48);
        let h = w * self.aspect;
        Grid { rows, columns, zoom: Zoom::In { w, h }, width: columns * w, height: rows * h }
    }

    /// The mean of the cells under a pixel; NaN where none has a value.
    fn value(&self, grid: &Grid, x: usize, y: usize) -> f32 {
        let (columns, rows) = match grid.zoom {
            Zoom::In { w, h } => (x / w..x / w + 1, y / h..y / h + 1),
            Zoom::Out { columns, rows } => (
                x * columns..((x + 1) * columns).min(grid.columns),
                y * rows..((y + 1) * rows).min(grid.rows),
            ),
        };
        let cells = rows.flat_map(|r| columns.clone().map(move |c| r * grid.columns + c));
        let values = cells.filter_map(|i| self.values.get(i)).filter(|v| !v.is_nan());
        let (sum, n) = values.fold((0.0, 0), |(sum, n), v| (sum + v, n + 1));
        if n == 0 { f32::NAN } else { sum / n as f32 }
    }

    fn colour(&self, value: f32) -> Colour {
        if value.is_nan() {
            return NOTHING;
        }
        match self.scale {
            Scale::Binary { .. } => mix(OFF, ON, value),
            Scale::Log { from, .. } => ramp(1.0 - value.max(1e-30).log10() / from as f32),
            Scale::Linear { .. } => ramp(value),
            Scale::UpTo { most, .. } => ramp(value / most),
        }
    }
}

const OFF: Colour = [214, 226, 240];
const ON: Colour = [24, 62, 112];

/// A sequential ramp whose lightness falls evenly.
fn ramp(x: f32) -> Colour {
    const STOPS: [Colour; 6] = [
        [252, 250, 228],
        [253, 214, 142],
        [246, 150, 93],
        [212, 78, 98],
        [128, 38, 118],
        [36, 14, 74],
    ];
    let x = x.clamp(0.0, 1.0) * (STOPS.len() - 1) as f32;
    let i = (x as usize).min(STOPS.len() - 2);
    mix(STOPS[i], STOPS[i + 1], x - i as f32)
}

fn mix(a: Colour, b: Colour, t: f32) -> Colour {
    let t = t.clamp(0.0, 1.0);
    std::array::from_fn(|i| {
        (f32::from(a[i]) + (f32::from(b[i]) - f32::from(a[i])) * t).round() as u8
    })
}

impl Figure {
    /// Draws the figure into a PNG file.
    pub(crate) fn save(&self, path: &Path) -> Result<()> {
        const LEFT: usize = 84;
        const GAP: usize = 40;
        const TOP: usize = 104;
        const BOTTOM: usize = 118;
        let grids: Vec<Grid> = self.panels.iter().map(Panel::grid).collect();
        let wide = |g: &Grid| LEFT + g.width.max(200) + GAP;
        let tallest = grids.iter().map(|g| g.height).max().unwrap_or(0);
        let probe = Canvas::new(1, 1)?;
        let text = probe.text_width(&self.title, 20.0, true).max(probe.text_width(
            &self.subtitle,
            13.0,
            false,
        ));
        let width = grids.iter().map(wide).sum::<usize>().max(text + 2 * GAP);
        let mut canvas = Canvas::new(width, TOP + tallest + BOTTOM)?;
        canvas.text(&self.title, (24, 36), (20.0, true), Anchor::Left);
        canvas.text(&self.subtitle, (24, 58), (13.0, false), Anchor::Left);
        let mut x = LEFT;
        for (panel, grid) in self.panels.iter().zip(&grids) {
            draw(&mut canvas, panel, grid, (x, TOP));
            x += wide(grid);
        }
        canvas.save(path)
    }
}

fn draw(canvas: &mut Canvas, panel: &Panel, grid: &Grid, (x0, y0): (usize, usize)) {
    for y in 0..grid.height {
        for x in 0..grid.width {
            canvas.set(x0 + x, y0 + y, panel.colour(panel.value(grid, x, y)));
        }
    }
    canvas.frame(x0, y0, grid.width, grid.height, FRAME);
    canvas.text(&panel.title, (x0, y0 - 12), (14.0, true), Anchor::Left);

    let centred = panel.columns.step == 1;
    let room = if centred { 28 } else { 64 };
    for tick in ticks(panel.columns.end, grid.width / room, centred) {
        let x = x0 + position(tick, &panel.columns, grid.width, grid.columns, centred);
        canvas.fill(x, y0 + grid.height + 1, 1, 4, FRAME);
        let at = (x, y0 + grid.height + 18);
        canvas.text(&tick.to_string(), at, SMALL, Anchor::Centre);
    }
    let centred = panel.rows.step == 1;
    for tick in ticks(panel.rows.end, grid.height / 28, centred) {
        let y = y0 + position(tick, &panel.rows, grid.height, grid.rows, centred);
        canvas.fill(x0 - 5, y, 4, 1, FRAME);
        canvas.text(&tick.to_string(), (x0 - 9, y + 4), SMALL, Anchor::Right);
    }
    let below = (x0 + grid.width / 2, y0 + grid.height + 36);
    canvas.text(panel.columns.label, below, (13.0, false), Anchor::Centre);
    canvas.text_up(panel.rows.label, (x0 - 56, y0 + grid.height / 2), 13.0);
    draw_scale(canvas, panel, x0, y0 + grid.height + 58);
}

/// Where a tick lies, in pixels: at the middle of its cell where cells are countable things.
fn position(tick: usize, axis: &Axis, pixels: usize, cells: usize, centred: bool) -> usize {
    let at = tick as f32 / axis.step as f32 + if centred { 0.5 } else { 0.0 };
    ((at / cells as f32 * pixels as f32) as usize).min(pixels.saturating_sub(1))
}

fn draw_scale(canvas: &mut Canvas, panel: &Panel, x: usize, y: usize) {
    const WIDTH: usize = 180;
    const HEIGHT: usize = 12;
    let key = |canvas: &mut Canvas, x: usize, colour: Colour, text: &str| {
        canvas.fill(x, y, HEIGHT, HEIGHT, colour);
        canvas.frame(x, y, HEIGHT, HEIGHT, FRAME);
        canvas.text(text, (x + HEIGHT + 7, y + HEIGHT - 1), SMALL, Anchor::Left);
        x + HEIGHT + 7 + canvas.text_width(text, SMALL.0, false) + 18
    };
    let nothing = panel.values.iter().any(|v| v.is_nan());
    let (from, to, label) = match &panel.scale {
        Scale::Binary { one, zero } => {
            let next = key(canvas, x, ON, one);
            let next = key(canvas, next, OFF, zero);
            if nothing {
                key(canvas, next, NOTHING, "not visible");
            }
            return;
        }
        Scale::Log { from, label } => (format!("10{}", superscript(*from)), "1".to_owned(), *label),
        Scale::Linear { label } => ("0".to_owned(), "1".to_owned(), *label),
        Scale::UpTo { most, label } => ("0".to_owned(), most.to_string(), *label),
    };
    for i in 0..WIDTH {
        canvas.fill(x + i, y, 1, HEIGHT, ramp(i as f32 / (WIDTH - 1) as f32));
    }
    canvas.frame(x, y, WIDTH, HEIGHT, FRAME);
    canvas.text(&from, (x, y + HEIGHT + 15), SMALL, Anchor::Left);
    canvas.text(&to, (x + WIDTH, y + HEIGHT + 15), SMALL, Anchor::Right);
    canvas.text(label, (x, y + HEIGHT + 34), SMALL, Anchor::Left);
    if nothing {
        key(canvas, x + WIDTH + 24, NOTHING, "none");
    }
}

fn superscript(n: i32) -> String {
    let digits = n.to_string();
    digits
        .chars()
        .map(|c| match c {
            '-' => '⁻',
            '1' => '¹',
            '2' => '²',
            '3' => '³',
            '0' => '⁰',
            c => c.to_digit(10).and_then(|d| char::from_u32(0x2070 + d)).unwrap_or(c),
        })
        .collect()
}

/// About `count` round numbers from 0 to `end` (without `end` itself where cells are countable).
fn ticks(end: usize, count: usize, countable: bool) -> Vec<usize> {
    let rough = end.div_ceil(count.max(1)).max(1);
    let mut unit = 1;
    let step = loop {
        // Token counts are powers of two more often than of ten.
        let steps = if countable { [1, 2, 5] } else { [1, 2, 4] };
        if let Some(step) = steps.iter().map(|s| s * unit).find(|&s| s >= rough) {
            break step;
        }
        unit *= if countable { 10 } else { 8 };
    };
    (0..end + usize::from(!countable)).step_by(step).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_few() {
        assert_eq!(ticks(4096, 6, false), [0, 1024, 2048, 3072, 4096]);
        assert_eq!(ticks(9, 20, true), [0, 1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(ticks(30, 4, true), [0, 10, 20]);
        assert_eq!(ticks(1, 0, false), [0, 1]);
    }

    #[test]
    fn large_maps_are_merged() {
        let axis = |step, end| Axis { label: "", step, end };
        let mut panel = Panel {
            title: String::new(),
            rows: axis(128, 128 * 1024),
            columns: axis(64, 128 * 1024),
            values: vec![1.0; 1024 * 2048],
            scale: Scale::Linear { label: "" },
            aspect: 2,
        };
        panel.values[0] = f32::NAN;
        let grid = panel.grid();
        assert!(grid.width <= MOST && grid.height <= 1024, "{} {}", grid.width, grid.height);
        assert_eq!(panel.value(&grid, 0, 0), 1.0);
        assert_eq!(panel.value(&grid, grid.width - 1, grid.height - 1), 1.0);
    }
}
