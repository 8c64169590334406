//! Requests with their times, lengths and prefix blocks: read from traces, scaled, or drawn by chance.

mod arrive;
mod azure;
mod error;
mod generate;
mod mooncake;
mod read;
mod requests;
mod scale;

pub use error::WorkloadError;
pub use generate::{Arrivals, Generator, Lengths};
pub use read::read;
pub use requests::{Request, Workload};
pub use scale::Spread;
