//! Drafts change nothing but the time: the same tokens come with them and without, whatever else happens to a sequence.
//!
//! The scripted engine draws each token from everything that it reads back from the arena. With a vocabulary of two or three
//! its tokens repeat at random, so that about as many guesses are right, and a wrong one that left a trace would show.

#![allow(clippy::unwrap_used)] // a test that panics fails, which is what is wanted

use baton_engine::{Backend, BlockPool, StubSpec, stub};
use baton_node_host::PoolBlocks;
use baton_node_host::engine::{
    Beginning, Control, Ending, EngineHandle, EngineParts, SequenceEvent, SequenceSpec, ShareWish, Speculation, Until,
    start,
};
use baton_node_runtime::{Clock, Supervisor, TaskHandle};
use baton_types::{
    ArenaView, BlockHashChain, CacheScope, FinishReason, KvDtype, ModelFingerprint, NumericsId, RequestId,
    SamplingParams,
};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

const BLOCK_TOKENS: usize = 16;

fn scope() -> CacheScope {
    CacheScope {
        fingerprint: ModelFingerprint([0; 32]),
        numerics: NumericsId(String::new()),
        dtype: KvDtype::F16,
        adapter: String::new(),
        salt: String::new(),
    }
}

struct Node {
    engine: EngineHandle,
    thread: TaskHandle,
    pool: Arc<BlockPool>,
    clock: Clock,
}

/// A request and what it brought.
struct Request {
    events: mpsc::Receiver<SequenceEvent>,
    control: Arc<Control>,
}

#[derive(Debug, Default, PartialEq)]
struct Answer {
    tokens: Vec<u32>,
    finish: Option<FinishReason>,
    cached_blocks: usize,
    starts: usize,
    drafted: u32,
    /// Tokens that needed no step of their own.
    extra: u32,
}

impl Node {
    fn start(spec: StubSpec, blocks: u32, speculation: Speculation) -> Self {
        let backend: Box<dyn Backend> = stub(spec);
        let geometry = backend.config().kv_geometry(BLOCK_TOKENS as u32, KvDtype::F16);
        let (pool, clock) = (BlockPool::new(blocks), Clock::new());
        let parts = EngineParts {
            ending: Ending::new(backend.config(), &[]),
            backend,
            arena: ArenaView::on_heap(geometry, blocks as usize),
            blocks: PoolBlocks::new(pool.clone()),
            queue_capacity: 64,
            running_max: 16,
            chunk_tokens: 32,
            speculation,
            room_changed: Box::new(|| {}),
        };
        let (engine, thread) = start(parts, clock, &Supervisor::new());
        Self {
            engine,
            thread,
            pool,
            clock,
        }
    }

    fn submit(&self, prompt: &[u32], sampling: SamplingParams) -> Request {
        let control = Control::new(true);
        let (sender, events) = mpsc::channel(1024);
        let mut chain = BlockHashChain::new(&scope());
        let hashes = prompt
            .chunks_exact(BLOCK_TOKENS)
            .map(|block| chain.push_block(block))
            .collect();
        let sequence = SequenceSpec {
            request_id: RequestId::random(),
            prompt: prompt.to_vec(),
            generated: Vec::new(),
            sampling,
            constraint: None,
            hashes,
            chain: Some(chain),
            deadline: self.clock.now() + Duration::from_secs(60),
            beginning: Beginning::Compute,
            until: Until::End,
            layer_borders: Arc::default(),
            control: control.clone(),
            events: sender,
        };
        self.engine.submit(sequence).unwrap();
        Request { events, control }
    }

    async fn end(self) {
        self.engine.close();
        self.thread.join().await;
        self.pool.check_integrity().unwrap();
        let counts = self.pool.counts();
        assert_eq!(counts.free + counts.cached, counts.total, "{counts:?}");
    }
}

impl Request {
    async fn finish(mut self) -> Answer {
        let mut answer = Answer::default();
        while answer.finish.is_none() {
            match self.events.recv().await.unwrap() {
                SequenceEvent::Started { held_blocks, .. } => {
                    answer.starts += 1;
                    answer.cached_blocks = held_blocks;
                }
                SequenceEvent::Token {
                    drawn, drafted, extra, ..
                } => {
                    assert_eq!(drawn.index as usize, answer.tokens.len());
                    answer.tokens.push(drawn.token);
                    answer.finish = drawn.finish;
                    answer.drafted += drafted;
                    answer.extra += u32::from(extra);
                }
                SequenceEvent::Computed { .. } | SequenceEvent::Layers { .. } => {}
                SequenceEvent::Failed { error } => panic!("{error}"),
            }
        }
        answer
    }
}

fn repeating(vocab: u32) -> StubSpec {
    StubSpec {
        vocab,
        eos_tokens: Vec::new(),
        ..StubSpec::default()
    }
}

fn prompt(seed: u32, tokens: u32, vocab: u32) -> Vec<u32> {
    (0..tokens).map(|i| (seed * 31 + i * 7 + i / 5) % vocab).collect()
}

fn greedy(max_tokens: u32) -> SamplingParams {
    SamplingParams {
        temperature: 0.0,
        max_tokens,
        ..SamplingParams::default()
    }
}

/// Greedy and sampled requests whose lengths stand before, at and behind block borders.
fn requests(vocab: u32) -> Vec<(Vec<u32>, SamplingParams)> {
    let lengths = [1, 2, 15, 16, 17, 31, 47, 48];
    let requests = lengths.into_iter().enumerate().map(|(i, tokens)| {
        let i = u32::try_from(i).unwrap();
        let sampling = match i % 3 {
            0 => greedy(60 + i),
            1 => SamplingParams {
                seed: u64::from(i),
                temperature: 0.7,
                max_tokens: 64 + i,
                ..SamplingParams::default()
            },
            _ => SamplingParams {
                seed: u64::from(i),
                frequency_penalty: 0.5,
                repetition_penalty: 1.2,
                logprobs: Some(1),
                max_tokens: 70 - i,
                ..SamplingParams::default()
            },
        };
        (prompt(i, tokens, vocab), sampling)
    });
    requests.collect()
}

async fn answers(node: &Node, requests: &[(Vec<u32>, SamplingParams)]) -> Vec<Answer> {
    let begun: Vec<Request> = requests
        .iter()
        .map(|(prompt, s)| node.submit(prompt, s.clone()))
        .collect();
    let mut answers = Vec::new();
    for request in begun {
        answers.push(request.finish().await);
    }
    answers
}

fn told(answers: &[Answer]) -> Vec<(&[u32], Option<FinishReason>)> {
    answers.iter().map(|a| (&a.tokens[..], a.finish)).collect()
}

#[tokio::test]
async fn the_same_tokens_are_drawn_with_drafts_and_without() {
    for vocab in [2, 3] {
        let requests = requests(vocab);
        let without = Node::start(repeating(vocab), 256, Speculation::Off);
        let reference = answers(&without, &requests).await;
        assert_eq!(reference.iter().map(|a| a.drafted + a.extra).sum::<u32>(), 0);
        without.end().await;
        for speculation in [Speculation::Always, Speculation::Auto] {
            let node = Node::start(repeating(vocab), 256, speculation);
            let found = answers(&node, &requests).await;
            assert_eq!(told(&found), told(&reference), "{speculation:?}, vocabulary of {vocab}");
            let (drafted, extra) = found.iter().fold((0, 0), |(d, e), a| (d + a.drafted, e + a.extra));
            if speculation == Speculation::Always {
                assert!(drafted > 300 && extra > 50 && extra < drafted, "{drafted} {extra}");
            }
            node.end().await;
        }
    }
}

#[tokio::test]
async fn an_end_of_sequence_within_a_draft_ends_it_there() {
    let spec = |eos_at| StubSpec {
        eos_tokens: vec![2],
        eos_at,
        ..repeating(3)
    };
    for eos_at in [20, 31, 32, 33, 50] {
        let requests: Vec<_> = (1..6).map(|seed| (prompt(seed, 10 + seed, 2), greedy(200))).collect();
        let (without, with) = (
            Node::start(spec(eos_at), 256, Speculation::Off),
            Node::start(spec(eos_at), 256, Speculation::Always),
        );
        let reference = answers(&without, &requests).await;
        let found = answers(&with, &requests).await;
        assert_eq!(told(&found), told(&reference));
        assert!(found.iter().all(|answer| answer.finish == Some(FinishReason::Stop)));
        without.end().await;
        with.end().await;
    }
}

#[tokio::test]
async fn without_blocks_to_spare_there_are_fewer_drafts_and_nobody_gives_way_for_them() {
    // As many blocks as the tokens need, to the last one: a draft that took one would make the sequence give way to itself.
    for tokens in [16u32, 40, 64] {
        let (prompt, max_tokens) = (prompt(1, 9, 2), tokens - 9 + 1);
        let blocks = tokens.div_ceil(BLOCK_TOKENS as u32);
        let roomy = Node::start(repeating(2), 64, Speculation::Off);
        let reference = roomy.submit(&prompt, greedy(max_tokens)).finish().await;
        roomy.end().await;
        let tight = Node::start(repeating(2), blocks, Speculation::Always);
        let found = tight.submit(&prompt, greedy(max_tokens)).finish().await;
        assert_eq!(found.tokens, reference.tokens);
        assert_eq!(found.starts, 1);
        tight.end().await;
    }
    // Eight sequences of up to eight blocks in 20: they give way to one another, begin anew and draft on.
    let requests = requests(2);
    let roomy = Node::start(repeating(2), 256, Speculation::Off);
    let reference = answers(&roomy, &requests).await;
    roomy.end().await;
    let tight = Node::start(repeating(2), 20, Speculation::Always);
    let found = answers(&tight, &requests).await;
    assert_eq!(told(&found), told(&reference));
    assert!(
        found.iter().map(|a| a.starts).sum::<usize>() > requests.len(),
        "none gave way"
    );
    assert!(found.iter().map(|a| a.extra).sum::<u32>() > 0);
    tight.end().await;
}

#[tokio::test]
async fn blocks_that_filled_up_under_drafts_are_cached_and_shared_as_they_should_be() {
    let (prompt, node) = (prompt(3, 20, 2), Node::start(repeating(2), 64, Speculation::Always));
    let request = node.submit(&prompt, greedy(400));
    let (to, mut shared) = mpsc::channel(32);
    request.control.share(ShareWish { blocks: 20, to });
    node.engine.wake();
    let whole = request.finish().await;
    assert!(whole.extra > 0);
    let (mut tables, mut next) = (Vec::new(), 0);
    while let Some(blocks) = shared.recv().await {
        assert_eq!(blocks.first, next, "in order, none left out");
        next += blocks.table.blocks().len();
        tables.push(blocks.table);
    }
    assert_eq!(next, 20);
    drop(tables);
    // Whoever begins with the same tokens reads the cached blocks, and goes on as the first one did.
    let known = [&prompt[..], &whole.tokens[..330]].concat();
    let again = node.submit(&known, greedy(70)).finish().await;
    assert_eq!(again.cached_blocks, (known.len() - 1) / BLOCK_TOKENS);
    assert_eq!(again.tokens, whole.tokens[330..]);
    node.end().await;
}

#[tokio::test]
async fn a_cancelled_sequence_with_drafts_leaves_nothing_behind() {
    let node = Node::start(repeating(2), 64, Speculation::Always);
    for taken in [1, 2, 7, 30] {
        let mut request = node.submit(&prompt(5, 30, 2), greedy(900));
        let mut tokens = 0;
        while tokens < taken {
            if let SequenceEvent::Token { .. } = request.events.recv().await.unwrap() {
                tokens += 1;
            }
        }
        request.control.cancel();
        node.engine.wake();
    }
    node.end().await;
}
