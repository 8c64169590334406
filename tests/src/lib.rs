//! What the end-to-end tests share: clusters of real processes, requests over the public doors, and the checks that every
//! test ends with. Nothing here is part of the product.

mod client;
mod cluster;
mod etcd;
mod moves;
pub mod netns;
mod process;
mod prompts;
mod random_llama;

pub use client::{Answer, Ask, Followed, ask, follow, http_get, http_post, retryable, stream_ask};
pub use cluster::{Cluster, ClusterOptions, Store};
pub use etcd::Etcd;
pub use moves::{Leave, Left, Streams, busy, leave_under_load, same_tokens};
pub use process::{Process, baton_binary, long_campaign, model_path, test_python, until};
pub use prompts::{Kind, Prompt, prompts};
pub use random_llama::RandomLlama;
