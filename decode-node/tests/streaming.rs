//! The last chunk of a prompt leaves its node layer by layer, while the step that computes it goes on: shown by a step that
//! does not go on before its finished layers have landed on the other node. In a test program of its own, because it reads
//! the process's metrics.

#![allow(clippy::unwrap_used)]

#[path = "roles/harness.rs"]
#[expect(dead_code, reason = "shared with tests that use more of it")]
mod harness;

use baton_engine::{Backend, ModelConfig, Slice, StepError, StepObserver, StepOutput, StubSpec, WantedLogits, stub};
use baton_node_runtime::{LogFormat, Metrics, TelemetryOptions};
use baton_types::{ArenaView, ModelFingerprint, NodeRole, NumericsId};
use harness::{Shape, TestNode, eventually, run_alone, run_pair, soon};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

const LAYERS: u32 = 6;
/// A layer of a block has 64 KiB: the least that is sent by itself.
const STUB: &str = "stub:layers=6,kv_heads=8,head_dim=128";
/// The first chunk has two blocks, the last one a whole block and a partly filled one.
const PROMPT: u32 = 32 + 16 + 7;

fn shape() -> Shape {
    Shape {
        blocks: 24,
        stub: STUB,
        ..Shape::default()
    }
}

/// Called by the engine thread when a layer of a prompt's last chunk is in the arena and its observer was told.
type Gate = Arc<dyn Fn(u32) + Send + Sync>;

/// The scripted engine, which goes through a gate behind each layer of a last chunk.
struct Gated {
    inner: Box<dyn Backend>,
    gate: Gate,
}

struct Behind<'a> {
    observer: &'a mut dyn StepObserver,
    gate: &'a Gate,
}

impl StepObserver for Behind<'_> {
    fn layer_done(&mut self, layer: u32) -> ControlFlow<()> {
        self.observer.layer_done(layer)?;
        (self.gate)(layer);
        ControlFlow::Continue(())
    }
}

impl Backend for Gated {
    fn config(&self) -> &ModelConfig {
        self.inner.config()
    }

    fn fingerprint(&self) -> ModelFingerprint {
        self.inner.fingerprint()
    }

    fn numerics(&self) -> &NumericsId {
        self.inner.numerics()
    }

    fn is_stub(&self) -> bool {
        true
    }

    fn step(
        &mut self,
        arena: &ArenaView,
        batch: &[Slice<'_>],
        observer: &mut dyn StepObserver,
    ) -> Result<StepOutput, StepError> {
        if batch.iter().all(|slice| slice.logits == WantedLogits::None) {
            return self.inner.step(arena, batch, observer);
        }
        let gate = &self.gate;
        self.inner.step(arena, batch, &mut Behind { observer, gate })
    }
}

async fn gated(gate: Gate) -> TestNode {
    let inner = stub(STUB.parse::<StubSpec>().unwrap());
    TestNode::start_with(NodeRole::Prefill, shape(), Box::new(Gated { inner, gate })).await
}

fn counter(metrics: &Metrics, name: &str) -> u64 {
    let text = metrics.render();
    let line = text.lines().find(|line| line.starts_with(name));
    line.map_or(0, |line| line.rsplit(' ').next().unwrap().parse().unwrap())
}

fn landed(metrics: &Metrics) -> u64 {
    counter(metrics, "baton_transport_landed_extents_total{")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn finished_layers_leave_while_the_step_goes_on() {
    let options = TelemetryOptions {
        log_format: LogFormat::Pretty,
        log_filter: "warn".to_owned(),
    };
    let metrics = baton_node_runtime::telemetry::init(&options).unwrap();
    each_layer_lands_before_the_next_is_computed(&metrics).await;
    a_request_cancelled_between_layers_leaves_nothing_behind(&metrics).await;
}

async fn each_layer_lands_before_the_next_is_computed(metrics: &Metrics) {
    let watched = metrics.clone();
    let gate = move |layer: u32| {
        // Two whole blocks of the first chunk, and a layer of two blocks each time.
        let expected = 2 + 2 * u64::from(layer + 1);
        let end = Instant::now() + Duration::from_secs(20);
        while landed(&watched) < expected {
            assert!(
                Instant::now() < end,
                "layer {layer}: {} of {expected} extents landed while the step waited",
                landed(&watched)
            );
            std::thread::sleep(Duration::from_millis(1));
        }
    };
    let p = gated(Arc::new(gate)).await;
    let d = TestNode::start(NodeRole::Decode, shape()).await;
    let alone = TestNode::start(NodeRole::Decode, shape()).await;
    let expected = run_alone(&alone, &alone.work(1, PROMPT, 8)).await;
    let (prefilled, decoded) = run_pair(&p, &d, &d.work(1, PROMPT, 8)).await;
    assert_eq!(decoded.tokens, expected.tokens);
    let blocks = u64::from(PROMPT).div_ceil(16);
    let bytes = prefilled.handed_over.unwrap().bytes;
    assert_eq!(bytes, blocks * d.host.model().geometry.block_bytes() as u64);
    assert_eq!(landed(metrics), 2 + 2 * u64::from(LAYERS));
    for node in [p, d, alone] {
        node.stop().await;
    }
}

async fn a_request_cancelled_between_layers_leaves_nothing_behind(metrics: &Metrics) {
    let (reached, mut at_the_gate) = mpsc::unbounded_channel();
    let (open, opened) = std::sync::mpsc::channel::<()>();
    let opened = std::sync::Mutex::new(opened);
    let gate = move |layer: u32| {
        if layer == 3 {
            reached.send(()).unwrap();
            opened.lock().unwrap().recv().unwrap();
        }
    };
    let p = gated(Arc::new(gate)).await;
    let d = TestNode::start(NodeRole::Decode, shape()).await;
    let work = d.work(2, PROMPT, 8);
    let mut stream = d.open(&work, false);
    stream.accepted().await;
    let prefilling = p.prefill(&work, &d).unwrap();
    soon("the fourth layer", at_the_gate.recv()).await.unwrap();
    drop(prefilling);
    eventually("the prefill request is over", || p.host.requests() == 0).await;
    open.send(()).unwrap();
    p.is_empty_again().await;
    eventually("the step was broken off", || {
        counter(metrics, "baton_node_steps_aborted_total") == 1
    })
    .await;
    drop(stream);
    p.stop().await;
    d.stop().await;
}
