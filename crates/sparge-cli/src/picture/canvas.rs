//! Pixels, rectangles and text.

use crate::error::{Error, Result};
use crate::output::write_atomically;
use fontdue::{Font, FontSettings};
use std::path::Path;

/// Red, green, blue.
pub(super) type Colour = [u8; 3];

pub(super) const INK: Colour = [38, 38, 44];
pub(super) const FRAME: Colour = [150, 150, 158];

/// How a text's anchor relates to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Anchor {
    Left,
    Centre,
    Right,
}

/// An RGB image.
pub(super) struct Canvas {
    width: usize,
    height: usize,
    pixels: Vec<u8>,
    regular: Font,
    bold: Font,
}

impl Canvas {
    /// A white canvas.
    pub(super) fn new(width: usize, height: usize) -> Result<Self> {
        let font = |bytes: &'static [u8]| {
            Font::from_bytes(bytes, FontSettings::default())
                .map_err(|e| Error::failed(format!("cannot load the picture's font: {e}")))
        };
        Ok(Self {
            width,
            height,
            pixels: vec![255; width * height * 3],
            regular: font(dejavu::sans::regular())?,
            bold: font(dejavu::sans::bold())?,
        })
    }

    /// Sets a pixel; outside the canvas nothing happens.
    pub(super) fn set(&mut self, x: usize, y: usize, colour: Colour) {
        if x < self.width && y < self.height {
            let at = (y * self.width + x) * 3;
            self.pixels[at..at + 3].copy_from_slice(&colour);
        }
    }

    /// Mixes `colour` over a pixel.
    fn blend(&mut self, x: usize, y: usize, colour: Colour, alpha: u8) {
        if x < self.width && y < self.height {
            let at = (y * self.width + x) * 3;
            for (pixel, colour) in self.pixels[at..at + 3].iter_mut().zip(colour) {
                let (a, old, new) = (u32::from(alpha), u32::from(*pixel), u32::from(colour));
                *pixel = ((old * (255 - a) + new * a + 127) / 255) as u8;
            }
        }
    }

    /// Fills a rectangle.
    pub(super) fn fill(&mut self, x: usize, y: usize, w: usize, h: usize, colour: Colour) {
        for y in y..y.saturating_add(h).min(self.height) {
            for x in x..x.saturating_add(w).min(self.width) {
                self.set(x, y, colour);
            }
        }
    }

    /// Draws a one-pixel frame just outside a rectangle.
    pub(super) fn frame(&mut self, x: usize, y: usize, w: usize, h: usize, colour: Colour) {
        let (x0, y0) = (x.saturating_sub(1), y.saturating_sub(1));
        self.fill(x0, y0, w + 2, 1, colour);
        self.fill(x0, y + h, w + 2, 1, colour);
        self.fill(x0, y0, 1, h + 2, colour);
        self.fill(x + w, y0, 1, h + 2, colour);
    }

    fn font(&self, bold: bool) -> &Font {
        if bold { &self.bold } else { &self.regular }
    }

    /// Width of a text in pixels.
    pub(super) fn text_width(&self, text: &str, px: f32, bold: bool) -> usize {
        let font = self.font(bold);
        text.chars().map(|c| font.metrics(c, px).advance_width).sum::<f32>().ceil() as usize
    }

    /// Draws a line of text on the baseline `y`.
    pub(super) fn text(
        &mut self,
        text: &str,
        (x, y): (usize, usize),
        (px, bold): (f32, bool),
        anchor: Anchor,
    ) {
        let width = self.text_width(text, px, bold) as f32;
        let mut pen = x as f32
            - match anchor {
                Anchor::Left => 0.0,
                Anchor::Centre => width / 2.0,
                Anchor::Right => width,
            };
        for c in text.chars() {
            let (metrics, coverage) = self.font(bold).rasterize(c, px);
            let left = pen.round() as i64 + i64::from(metrics.xmin);
            let top = y as i64 - i64::from(metrics.ymin) - metrics.height as i64;
            for (i, &alpha) in coverage.iter().enumerate() {
                let x = left + (i % metrics.width) as i64;
                let y = top + (i / metrics.width) as i64;
                if let (Ok(x), Ok(y)) = (x.try_into(), y.try_into()) {
                    self.blend(x, y, INK, alpha);
                }
            }
            pen += metrics.advance_width;
        }
    }

    /// Draws a text that reads upwards, centred on `y`, its baseline at `x`.
    pub(super) fn text_up(&mut self, text: &str, (x, y): (usize, usize), px: f32) {
        let mut pen = y as f32 + self.text_width(text, px, false) as f32 / 2.0;
        for c in text.chars() {
            let (metrics, coverage) = self.regular.rasterize(c, px);
            let bottom = pen.round() as i64 - i64::from(metrics.xmin);
            let left = x as i64 - i64::from(metrics.ymin) - metrics.height as i64;
            for (i, &alpha) in coverage.iter().enumerate() {
                let x = left + (i / metrics.width) as i64;
                let y = bottom - (i % metrics.width) as i64;
                if let (Ok(x), Ok(y)) = (x.try_into(), y.try_into()) {
                    self.blend(x, y, INK, alpha);
                }
            }
            pen -= metrics.advance_width;
        }
    }

    /// Writes the picture as a PNG file.
    pub(super) fn save(&self, path: &Path) -> Result<()> {
        let (width, height) = (self.width as u32, self.height as u32);
        write_atomically(path, |file| {
            let mut encoder = png::Encoder::new(file, width, height);
            encoder.set_color(png::ColorType::Rgb);
            encoder.set_depth(png::BitDepth::Eight);
            let mut writer = encoder.write_header().map_err(std::io::Error::other)?;
            writer.write_image_data(&self.pixels).map_err(std::io::Error::other)?;
            writer.finish().map_err(std::io::Error::other)
        })
    }
}
