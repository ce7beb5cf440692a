//! A calibration as one HTML page that needs nothing else: heat maps, and a table of every head.

use super::calibration::summary;
use crate::terminal::percent;
use sparge::calibrate::{Calibration, HeadSettings};
use std::fmt::Write;

const STYLE: &str = "\
body { font: 15px/1.45 system-ui, sans-serif; color: #26262c; margin: 2rem auto; max-width: 64rem; padding: 0 1rem }
h1 { font-size: 1.4rem } h2 { font-size: 1.05rem; margin: 2rem 0 .5rem }
svg { max-width: 100%; height: auto } svg text { font: 11px system-ui, sans-serif; fill: #26262c }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .15rem .7rem; text-align: right; border-bottom: 1px solid #e4e4ea }
details { margin: 1rem 0 } summary { cursor: pointer }
";

/// The page.
pub(super) fn page(c: &Calibration) -> String {
    let name = escaped(&c.model.id);
    let mut page = format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width\">\n<title>{name}: calibration</title>\n\
         <style>\n{STYLE}</style>\n</head>\n<body>\n<h1>{name}: what each head skips</h1>\n<p>{}</p>\n",
        escaped(&summary(c))
    );
    let p = c.settings.pooling;
    let second = if p.second_order { " with the second-order term" } else { "" };
    let rows = p.sampled_rows;
    let dense = c.layers.iter().flat_map(|l| &l.heads).filter(|h| h.is_dense()).count();
    let _ = writeln!(
        page,
        "<p>Prediction from {}×{} means{second} and {rows} sampled rows; first blocks kept: {}; blocks before the diagonal kept: {}; calls with fewer than {} keys \
         run dense; {dense} of {} heads dense. Made by {}; sha256 of the model {}.</p>",
        p.q_rows,
        p.kv_rows,
        c.settings.keep_first,
        c.settings.keep_local,
        c.settings.min_kv_len,
        c.layers.len() * c.model.num_qo_heads,
        escaped(&c.made_by),
        c.model.sha256.as_deref().map_or("not known".into(), escaped),
    );
    let l2 = c.bounds.l2;
    map(&mut page, c, "Q·Kᵀ skipped", &|h| h.measured.qk_sparsity, 1.0, &percent);
    map(&mut page, c, "P·V skipped", &|h| h.measured.pv_sparsity, 1.0, &percent);
    map(&mut page, c, "Relative L1", &|h| h.measured.rel_l1, l2, &|x| format!("{x:.4}"));
    page += "<h2>Every head</h2>\n";
    for (i, layer) in c.layers.iter().enumerate() {
        let n = layer.heads.len().max(1) as f64;
        let mean = layer.heads.iter().map(|h| h.measured.qk_sparsity).sum::<f64>() / n;
        let _ = writeln!(
            page,
            "<details><summary>Layer {i}: {} of Q·Kᵀ skipped</summary>\n<table>\n<tr><th>head</th>\
             <th>selection</th><th>θ</th><th>λ</th><th>QK skipped</th><th>PV skipped</th>\
             <th>relative L1</th></tr>",
            percent(mean)
        );
        for (head, h) in layer.heads.iter().enumerate() {
            let _ = writeln!(
                page,
                "<tr><td>{head}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td>\
                 <td>{:.4}</td></tr>",
                selection(h),
                if h.theta == 0.0 { "off".into() } else { h.theta.to_string() },
                h.lambda.map_or("off".into(), |l| l.to_string()),
                percent(h.measured.qk_sparsity),
                percent(h.measured.pv_sparsity),
                h.measured.rel_l1
            );
        }
        page += "</table></details>\n";
    }
    page + "</body>\n</html>\n"
}

fn selection(h: &HeadSettings) -> String {
    let cdf = h.cdf.map(|x| format!("τ = {x}"));
    let top_k = h.top_k.map(|x| format!("top-k {x}"));
    let parts: Vec<String> = cdf.into_iter().chain(top_k).collect();
    if parts.is_empty() { "dense".into() } else { parts.join(" or ") }
}

/// A heat map, layers from left to right; 0 is pale, `most` dark. The number of a cell shows when
/// the pointer rests on it.
fn map(
    page: &mut String,
    c: &Calibration,
    title: &str,
    value: &dyn Fn(&HeadSettings) -> f64,
    most: f64,
    text: &dyn Fn(f64) -> String,
) {
    const CELL: usize = 24;
    const LEFT: usize = 56;
    let (layers, heads) = (c.layers.len(), c.model.num_qo_heads);
    let (width, height) = (LEFT + layers * CELL + 8, heads * CELL + 40);
    let _ = writeln!(
        page,
        "<h2>{title}</h2>\n<svg viewBox=\"0 0 {width} {height}\" width=\"{width}\" role=\"img\" \
         aria-label=\"{title} by layer and head\">"
    );
    for (i, layer) in c.layers.iter().enumerate() {
        for (h, head) in layer.heads.iter().enumerate() {
            let x = value(head);
            let lightness = 97.0 - 72.0 * (x / most).clamp(0.0, 1.0);
            let _ = writeln!(
                page,
                "<rect x=\"{}\" y=\"{}\" width=\"{}\" height=\"{}\" fill=\"hsl(215 65% {lightness:.0}%)\">\
                 <title>layer {i}, head {h}: {}</title></rect>",
                LEFT + i * CELL,
                h * CELL,
                CELL - 1,
                CELL - 1,
                text(x)
            );
        }
    }
    let every = |n: usize| {
        if n > 40 {
            10
        } else if n > 12 {
            5
        } else {
            1
        }
    };
    for h in (0..heads).step_by(every(heads)) {
        let y = h * CELL + CELL / 2 + 4;
        let _ = writeln!(page, "<text x=\"{}\" y=\"{y}\" text-anchor=\"end\">{h}</text>", LEFT - 6);
    }
    for i in (0..layers).step_by(every(layers)) {
        let (x, y) = (LEFT + i * CELL + CELL / 2, heads * CELL + 14);
        let _ = writeln!(page, "<text x=\"{x}\" y=\"{y}\" text-anchor=\"middle\">{i}</text>");
    }
    let _ = writeln!(
        page,
        "<text x=\"{}\" y=\"{}\" text-anchor=\"middle\">layer</text>\
         <text x=\"0\" y=\"{}\">head</text>\n</svg>",
        LEFT + layers * CELL / 2,
        heads * CELL + 32,
        heads * CELL / 2
    );
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_become_markup() {
        assert_eq!(escaped("<b a=\"x\">&"), "&lt;b a=&quot;x&quot;&gt;&amp;");
    }
}
