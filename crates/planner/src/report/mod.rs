//! A plan as others read it: one JSON value, and one page that shows it. The page holds its charts, its library and its data;
//! it asks the network for nothing.

mod about;
mod curves;
mod page;
mod value;
mod words;

pub use about::About;
pub use page::html;
pub use value::value;
pub use words::{bottleneck, cost_per_mtok, fix, nearest};
