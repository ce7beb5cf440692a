//! Bars in the terminal.

use super::Layer;
use crate::terminal::{bar, percent};

/// The skipped share of every layer as bars, in two columns.
pub(crate) fn layers(layers: &[Layer]) -> String {
    const WIDTH: usize = 20;
    let half = layers.len().div_ceil(2);
    let cell = |layer: &Layer| {
        let share = layer.qk_sparsity;
        format!("{:>3} {} {:>6}", layer.layer, bar(share, WIDTH), percent(share))
    };
    let mut text = String::new();
    for i in 0..half {
        text += &cell(&layers[i]);
        if let Some(right) = layers.get(half + i) {
            text += "    ";
            text += &cell(right);
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_layer_has_a_bar() {
        let all: Vec<Layer> = (0..5)
            .map(|layer| Layer { layer, qk_sparsity: layer as f64 / 4.0, pv_sparsity: 0.0 })
            .collect();
        let text = layers(&all);
        assert_eq!(text.lines().count(), 3);
        assert_eq!(text.matches('%').count(), 5);
        assert_eq!(layers(&[]), "");
    }
}
