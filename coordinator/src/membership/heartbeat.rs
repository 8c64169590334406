//! Listens to one node: a stream that the node feeds with its load. When it breaks or falls silent the node is lost until
//! it speaks again. The first words of a model's first node bring its card.

use super::model::{Model, fetch};
use super::{Members, NewMember};
use crate::core::Node;
use baton_node_runtime::{Clock, Supervisor};
use baton_proto::v1;
use baton_proto::v1::node_client::NodeClient;
use baton_types::Instance;
use std::time::Duration;
use tokio::sync::oneshot;

/// Between two attempts at a node that does not answer.
const RECONNECT_PAUSE: Duration = Duration::from_millis(250);
/// Intervals without a word after which a node is lost.
const SILENT_INTERVALS: u32 = 6;
/// How long the first word may take, over and above what silence may.
const OPEN_TIMEOUT: Duration = Duration::from_secs(3);
const CARD_TIMEOUT: Duration = Duration::from_secs(20);

pub(super) struct HeartbeatOptions {
    pub(super) members: Members,
    pub(super) instance: Instance,
    pub(super) interval: Duration,
    pub(super) clock: Clock,
    pub(super) supervisor: Supervisor,
}

/// Listens for ever.
pub(super) async fn listen(new: NewMember, options: HeartbeatOptions) {
    let mut card_failed = None;
    loop {
        let error = listen_once(&new, &options, &mut card_failed).await;
        options.members.lost(&new.node, &error);
        options.clock.sleep(RECONNECT_PAUSE).await;
    }
}

/// Listens until the stream breaks; gives the reason.
async fn listen_once(new: &NewMember, options: &HeartbeatOptions, card_failed: &mut Option<String>) -> String {
    let request = v1::HeartbeatRequest {
        coordinator_instance: options.instance.to_string(),
        interval_ms: u32::try_from(options.interval.as_millis()).unwrap_or(u32::MAX),
    };
    let mut client = NodeClient::new(new.channel.clone());
    let mut beats = match options.clock.timeout(OPEN_TIMEOUT, client.heartbeat(request)).await {
        Ok(Ok(answer)) => answer.into_inner(),
        Ok(Err(status)) => return status.message().to_owned(),
        Err(elapsed) => return elapsed.to_string(),
    };
    let silence_max = options.interval * SILENT_INTERVALS;
    let mut changes = options.members.changes();
    loop {
        let beat = tokio::select! {
            biased;
            beat = options.clock.timeout(silence_max, beats.message()) => beat,
            // A node speaks before its record names its model; then its card need not wait for the next beat.
            () = changes.changed(), if !options.members.has_model_of(&new.node) => {
                bring_card(&new.node, options, card_failed).await;
                continue;
            }
        };
        let beat = match beat {
            Ok(Ok(Some(beat))) => beat,
            Ok(Ok(None)) => return "it closed its heartbeat".to_owned(),
            Ok(Err(status)) => return status.message().to_owned(),
            Err(_) => return format!("silent for {silence_max:?}"),
        };
        if beat.instance != new.node.instance.to_string() {
            return format!("another process ({}) answers at its address", beat.instance);
        }
        options.members.beat(&new.node, beat);
        bring_card(&new.node, options, card_failed).await;
    }
}

/// Fetches the model's card where it is wanted. A failure is said once, not at every beat.
async fn bring_card(node: &Node, options: &HeartbeatOptions, failed: &mut Option<String>) {
    let Some(wanted) = options.members.card_wanted(node) else {
        return;
    };
    let fetched = options.clock.timeout(CARD_TIMEOUT, fetch(&wanted)).await;
    let name = wanted.model.clone();
    let model = match fetched {
        Ok(Ok(bytes)) => {
            let (answer, read) = oneshot::channel();
            let created = options.clock.unix_seconds();
            // Nobody waits any more where the node has gone.
            let work = move || drop(answer.send(Model::read(&bytes, &wanted, created)));
            options.supervisor.spawn_blocking("model-card", work);
            let read = read.await;
            read.map_or_else(
                |_| Err("it could not be read".to_owned()),
                |model| model.map_err(|error| error.to_string()),
            )
        }
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err("the model card takes too long".to_owned()),
    };
    match model {
        Ok(model) => {
            let card = &model.card;
            tracing::info!(node_id = %node.id, model = card.name, context_tokens = card.context_tokens, "model card read");
            options.members.set_model(&name, model);
        }
        Err(error) => {
            if failed.as_ref() != Some(&error) {
                tracing::warn!(node_id = %node.id, model = name, error, "model card refused");
                options.members.note_fault(node, format!("model card refused: {error}"));
                *failed = Some(error);
            }
        }
    }
}
