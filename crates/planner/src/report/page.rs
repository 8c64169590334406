//! The page: a skeleton into which the style, the library, the data and what draws them are put.

use super::{About, value};
use crate::search::Answer;

const PAGE: &str = include_str!("page.html");
const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");
/// uPlot 1.6.32, MIT: <https://github.com/leeoniya/uPlot>.
const LIBRARY: &str = include_str!("uplot/uPlot.iife.min.js");
const LIBRARY_STYLE: &str = include_str!("uplot/uPlot.min.css");
const LIBRARY_LICENCE: &str = include_str!("uplot/LICENSE");

/// One HTML page that holds all it needs.
pub fn html(about: &About<'_>, answer: &Answer) -> String {
    // Nothing in the data may end its element.
    let data = value(about, answer).to_string().replace('<', "\\u003c");
    let mut page = String::with_capacity(PAGE.len() + LIBRARY.len() + data.len() + 20_000);
    let mut rest = PAGE;
    while let Some((before, after)) = rest.split_once("{{") {
        page.push_str(before);
        let Some((name, after)) = after.split_once("}}") else {
            break;
        };
        page.push_str(match name {
            "style" => STYLE,
            "library-style" => LIBRARY_STYLE,
            "library-licence" => LIBRARY_LICENCE,
            "library" => LIBRARY,
            "script" => SCRIPT,
            "data" => &data,
            _ => "",
        });
        rest = after;
    }
    page.push_str(rest);
    page
}
