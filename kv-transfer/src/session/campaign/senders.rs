//! The senders: the driver's part of each hand-over, as the endpoint does it, and processes that stop, end and come back.

use super::super::planted::{self, Planted};
use super::*;

impl World {
    /// A sender begins a hand-over, if it has room for the context.
    pub(super) fn open_hand(&mut self, at: usize, to: usize, ticket: Ticket) {
        let Some(role) = self.receivers[to].roles.get(&ticket) else {
            return;
        };
        let (attempt, context, until) = (role.attempt, role.context, role.deadline);
        if self.senders[at].stopped
            || self
                .hands
                .values()
                .any(|hand| (hand.ticket, hand.attempt) == (ticket, attempt))
        {
            return;
        }
        let free = |(_, block): &(usize, &SourceBlock)| block.claims == 0;
        let sources: Vec<usize> = self.senders[at]
            .sources
            .iter()
            .enumerate()
            .filter(free)
            .map(|(n, _)| n)
            .collect();
        if sources.len() < context as usize {
            return;
        }
        let sources = sources[..context as usize].to_vec();
        for (ordinal, source) in (0..).zip(&sources) {
            // The sequence itself holds its blocks while it lives: here, until the outcome.
            self.senders[at].sources[*source] = SourceBlock {
                value: Some((ticket, ordinal)),
                claims: 1,
            };
        }
        let deadline = if self.dice.one_in(5) {
            self.now + MS * 300
        } else {
            until
        };
        let machine = Sender::new(SenderLimits {
            layers: LAYERS,
            deadline,
            fence_timeout: FENCE,
            answer_timeout: 400 * MS,
            digest: self.digests,
        });
        let hand = Hand {
            at,
            to,
            ticket,
            attempt,
            deadline,
            machine,
            linked: false,
            seeks: None,
            path: None,
            sources,
            plan: None,
            completed: false,
            kept: Vec::new(),
            queue: VecDeque::new(),
            in_flight: BTreeSet::new(),
            undrained: false,
            wrote: false,
            fence: None,
            close_path: false,
            leased_until: Duration::MAX,
        };
        let number = self.number();
        self.hands.insert(number, hand);
        self.bring(
            number,
            SenderEvent::Reserve {
                context_tokens: u64::from(context),
            },
        );
    }

    /// Brings an event to a hand-over and does what its driver does at once.
    pub(super) fn bring(&mut self, number: u64, event: SenderEvent) {
        let Some(hand) = self.hands.get_mut(&number) else {
            return;
        };
        hand.machine.handle(self.now, event);
        self.settle_hand(number);
    }

    fn settle_hand(&mut self, number: u64) {
        loop {
            let Some(hand) = self.hands.get_mut(&number) else {
                return;
            };
            let effects = hand.machine.take_effects();
            if effects.is_empty() {
                break;
            }
            for effect in effects {
                self.perform_sender(number, effect);
            }
        }
        let Some(hand) = self.hands.get_mut(&number) else {
            return;
        };
        if let (None, Some(grant)) = (&hand.plan, hand.machine.grant()) {
            hand.leased_until = self.now + grant.lease;
            // Whole blocks or layers, in any order.
            let by_layer = self.dice.one_in(2);
            let mut plan: Vec<(u32, Range<u32>)> = Vec::new();
            for ordinal in grant.wanted.clone() {
                match by_layer {
                    true => plan.extend((0..LAYERS).map(|layer| (ordinal, layer..layer + 1))),
                    false => plan.push((ordinal, 0..LAYERS)),
                }
            }
            if self.dice.one_in(3) {
                for at in (1..plan.len()).rev() {
                    let with = self.dice.throw(at + 1);
                    plan.swap(at, with);
                }
            }
            if let Some(hand) = self.hands.get_mut(&number) {
                hand.plan = Some(plan.into());
            }
        }
        self.end_if_over(number);
    }

    fn end_if_over(&mut self, number: u64) {
        let Some(hand) = self.hands.get_mut(&number) else {
            return;
        };
        if hand.machine.outcome().is_some() {
            let (at, kept, sources) = (
                hand.at,
                std::mem::take(&mut hand.kept),
                std::mem::take(&mut hand.sources),
            );
            hand.queue.clear();
            for source in kept.iter().map(|piece| piece.source).chain(sources) {
                let block = &mut self.senders[at].sources[source];
                block.claims = block.claims.saturating_sub(1);
            }
        }
        let Some(hand) = self.hands.get(&number) else { return };
        if hand.machine.is_over() {
            let ended = match hand.machine.outcome() {
                Some(Ok(())) => 1,
                Some(Err(_)) | None => 0,
            };
            let (path, close) = (hand.path, hand.close_path);
            self.note(&[30, number, ended]);
            self.hands.remove(&number);
            if let (Some(path), true) = (path, close) {
                self.break_path(path);
            }
        }
    }

    fn perform_sender(&mut self, number: u64, effect: SenderEffect) {
        let Some(hand) = self.hands.get_mut(&number) else {
            return;
        };
        if !hand.linked {
            return;
        }
        match effect {
            SenderEffect::Send { epoch, message } => {
                let header = Header {
                    ticket: hand.ticket,
                    attempt: hand.attempt,
                    epoch,
                };
                let key = (hand.at, hand.to);
                if let Some(line) = self.lines.get_mut(&key) {
                    line.to_receiver.push_back((header, message));
                }
            }
            SenderEffect::Fence { epoch } => hand.fence = Some(epoch),
            SenderEffect::NextPath { failed } => {
                hand.queue.clear();
                hand.in_flight.clear();
                (hand.wrote, hand.undrained) = (false, false);
                hand.seeks = Some(failed);
                if let Some(path) = hand.path.take() {
                    self.break_path(path);
                }
            }
            SenderEffect::Rewrite => {
                let grant = hand.machine.grant();
                let wanted = |piece: &Piece| grant.is_some_and(|grant| grant.destination(piece.ordinal).is_some());
                hand.queue = (0..hand.kept.len()).filter(|at| wanted(&hand.kept[*at])).collect();
                hand.undrained = true;
            }
            SenderEffect::ClosePath => hand.close_path = true,
        }
    }

    /// One thing that the task of a hand-over, or its role, has to do.
    pub(super) fn work(&mut self, number: u64) {
        let Some(hand) = self.hands.get(&number) else { return };
        let (at, to, key) = (hand.at, hand.to, (hand.at, hand.to));
        if self.senders[at].stopped {
            return;
        }
        if planted::is(Planted::SourceFreed) && hand.leased_until <= self.now {
            for source in &hand.sources {
                self.senders[at].sources[*source] = SourceBlock::default();
            }
        }
        if !hand.linked {
            return self.link(number, key);
        }
        if let Some(failed) = &hand.seeks {
            let kinds: Vec<PathKind> = KINDS.into_iter().filter(|kind| !failed.contains(kind)).collect();
            return self.find_path(number, at, to, &kinds);
        }
        let broken = hand
            .path
            .is_none_or(|path| self.paths.get(&path).is_none_or(|path| path.broken));
        if hand.fence.is_some() {
            return self.fence(number, broken);
        }
        let writing = !hand.in_flight.is_empty() || !hand.queue.is_empty();
        if let Some(epoch) = hand
            .machine
            .grant()
            .map(|grant| grant.epoch)
            .filter(|_| broken && writing)
        {
            let reason = "the path broke".to_owned();
            let path = String::new();
            let error = TransferError::PathFailed { path, reason };
            return self.bring(number, SenderEvent::WriteFailed { epoch, error });
        }
        if hand.undrained && !writing {
            if let Some(hand) = self.hands.get_mut(&number) {
                hand.undrained = false;
            }
            return self.bring(number, SenderEvent::Drained);
        }
        let to_write = !hand.queue.is_empty();
        match &hand.plan {
            Some(plan) if !plan.is_empty() && (!to_write || self.dice.one_in(2)) => self.push(number),
            _ if to_write => self.batch(number),
            Some(plan) if plan.is_empty() && !hand.completed => {
                if let Some(hand) = self.hands.get_mut(&number) {
                    hand.completed = true;
                }
                let payload = bytes::Bytes::new();
                self.bring(number, SenderEvent::Complete { payload });
            }
            Some(_) | None => {}
        }
    }

    fn link(&mut self, number: u64, key: (usize, usize)) {
        let instance = self.senders[key.0].instance;
        let fresh = |line: &Line| line.instance == instance;
        if !self.lines.get(&key).is_some_and(fresh) {
            self.redial(key);
        }
        if let Some(hand) = self.hands.get_mut(&number) {
            hand.linked = true;
            hand.seeks = Some(Vec::new());
        }
    }

    /// A control line takes the place of what was there. Both ends have seen the former one's end by then.
    fn redial(&mut self, key: (usize, usize)) {
        self.break_line(key);
        while let Some(which) = self.unseen_by_sender.iter().position(|(at, to, _)| (*at, *to) == key) {
            self.sender_sees(which);
        }
        let instance = self.senders[key.0].instance;
        let seen = |(to, gone): &(usize, Instance)| (*to, *gone) == (key.1, instance);
        while let Some(which) = self.unseen_by_receiver.iter().position(seen) {
            self.receiver_sees(which);
        }
        let line = Line {
            instance,
            to_receiver: VecDeque::new(),
            to_sender: VecDeque::new(),
            latest: None,
        };
        self.lines.insert(key, line);
    }

    fn find_path(&mut self, number: u64, at: usize, to: usize, kinds: &[PathKind]) {
        let mut kinds = kinds.to_vec();
        while !kinds.is_empty() {
            let kind = kinds.swap_remove(self.dice.throw(kinds.len()));
            if let Some(path) = self.path(at, to, kind) {
                if let Some(hand) = self.hands.get_mut(&number) {
                    (hand.path, hand.seeks) = (Some(path), None);
                }
                self.note(&[31, number, path, kind as u64]);
                return self.bring(number, SenderEvent::Connected { path: kind });
            }
        }
        if let Some(hand) = self.hands.get_mut(&number) {
            hand.seeks = None;
        }
        let (wanted, offered) = (String::new(), String::new());
        let error = TransferError::NoPath { wanted, offered };
        self.bring(number, SenderEvent::ConnectFailed { error });
    }

    fn fence(&mut self, number: u64, broken: bool) {
        let Some(hand) = self.hands.get_mut(&number) else {
            return;
        };
        let Some(epoch) = hand.fence.take() else { return };
        let event = match (hand.wrote, broken) {
            (false, _) => SenderEvent::FenceSent { connections: 0 },
            (true, true) => SenderEvent::FenceFailed,
            (true, false) => {
                let path = hand
                    .path
                    .and_then(|path| self.paths.get(&path))
                    .expect("it is not broken");
                for connection in path.connections {
                    if let Some(wire) = self.wires.get_mut(&connection) {
                        wire.items.push_back(Item::Marker(epoch));
                    }
                }
                SenderEvent::FenceSent { connections: 2 }
            }
        };
        self.bring(number, event);
    }

    fn push(&mut self, number: u64) {
        let now = self.now;
        let Some(hand) = self.hands.get_mut(&number) else {
            return;
        };
        let Some((ordinal, layers)) = hand.plan.as_mut().and_then(VecDeque::pop_front) else {
            return;
        };
        let at = hand.at;
        let source = hand.sources.get(ordinal as usize).copied();
        let pushed = hand.machine.push(now, ordinal, &layers);
        if let (Ok(push @ (Push::Write(_) | Push::Keep)), Some(source)) = (pushed, source) {
            if matches!(push, Push::Write(_)) {
                hand.queue.push_back(hand.kept.len());
                hand.undrained = true;
            }
            hand.kept.push(Piece {
                ordinal,
                layers,
                source,
                summed: false,
            });
            self.senders[at].sources[source].claims += 1;
        }
        self.settle_hand(number);
    }

    /// Writes what is next in the queue, each extent over some connection.
    fn batch(&mut self, number: u64) {
        for _ in 0..=self.dice.throw(3) {
            let Some(hand) = self.hands.get_mut(&number) else {
                return;
            };
            let (Some(grant), Some(path)) = (hand.machine.grant(), hand.path) else {
                return;
            };
            let Some(piece) = hand.queue.front().copied() else {
                return;
            };
            let (epoch, destination) = (grant.epoch, grant.destination(hand.kept[piece].ordinal));
            hand.queue.pop_front();
            let Some(destination) = destination else { continue };
            hand.wrote = true;
            let kept = &mut hand.kept[piece];
            let (ordinal, layers, source) = (kept.ordinal, kept.layers.clone(), (hand.at, kept.source));
            let summed = std::mem::replace(&mut kept.summed, true);
            let connections = self.paths[&path].connections;
            let two_sided = self.paths[&path].kind == PathKind::Tcp;
            let copies = 1 + usize::from(two_sided && !self.calm && self.dice.one_in(12));
            for _ in 0..copies {
                let frame = Frame {
                    number: self.number(),
                    hand: number,
                    epoch,
                    ordinal,
                    layers: layers.clone(),
                    destination,
                    source,
                    remains: None,
                    applied: false,
                };
                self.senders[source.0].sources[source.1].claims += 1;
                self.note(&[32, number, frame.number, u64::from(ordinal)]);
                if let Some(hand) = self.hands.get_mut(&number) {
                    hand.in_flight.insert(frame.number);
                }
                let connection = connections[self.dice.throw(2)];
                match self.wires.get_mut(&connection) {
                    Some(wire) => wire.items.push_back(Item::Frame(frame)),
                    None => self.let_source_go(&frame),
                }
            }
            if !summed && self.digests {
                let value = self.senders[source.0].sources[source.1].value;
                let sum = layers.clone().fold(0_u64, |sum, layer| {
                    sum.wrapping_add(mix(ordinal, layer, crc(value, layer)))
                });
                let layers = layers.end - layers.start;
                self.bring(number, SenderEvent::Summed { ordinal, layers, sum });
            }
        }
    }

    /// The next message of a line reaches one of its ends.
    pub(super) fn deliver_message(&mut self, key: (usize, usize), to_receiver: bool) {
        let stopped = self.senders[key.0].stopped;
        let Some(line) = self.lines.get_mut(&key) else { return };
        let from = line.instance;
        if to_receiver {
            let Some((header, message)) = line.to_receiver.pop_front() else {
                return;
            };
            if let ToReceiver::Reserve { .. } = &message
                && let Some(role) = self.receivers[key.1].roles.get_mut(&header.ticket)
                && header.attempt > role.attempt
            {
                (role.attempt, role.open) = (header.attempt, true);
            }
            return self.tell(key.1, Event::Message { from, header, message });
        }
        if stopped {
            return;
        }
        let Some((header, message)) = line.to_sender.pop_front() else {
            return;
        };
        let later = header.epoch > line.latest;
        let grant = matches!(message, ToSender::Grant { .. });
        if grant && later {
            line.latest = header.epoch;
        }
        let its = |hand: &Hand| {
            (hand.at, hand.to, hand.ticket, hand.attempt, hand.linked)
                == (key.0, key.1, header.ticket, header.attempt, true)
        };
        let number = self.hands.iter().find(|(_, hand)| its(hand)).map(|(number, _)| *number);
        match number {
            Some(number) => self.bring(
                number,
                SenderEvent::Message {
                    epoch: header.epoch,
                    message,
                },
            ),
            None if grant && later => {
                let message = ToReceiver::Fenced { connections: 0 };
                if let Some(line) = self.lines.get_mut(&key) {
                    line.to_receiver.push_back((header, message));
                }
            }
            None => {}
        }
    }

    /// The process ends; what it had in the network goes on without it. Another takes its place.
    pub(super) fn restart_sender(&mut self, at: usize) {
        let gone = self.senders[at].instance;
        for wire in self.wires.values_mut().filter(|wire| wire.from.writer == gone) {
            wire.closing = true;
            let frames = wire.items.iter_mut().filter_map(|item| match item {
                Item::Frame(frame) => Some(frame),
                Item::Marker(_) => None,
            });
            for frame in frames.chain(wire.receiving.as_mut().map(|(_, _, frame)| frame)) {
                let value = self.senders[at].sources[frame.source.1].value;
                frame.remains.get_or_insert(value);
            }
        }
        for path in self.paths.values_mut().filter(|path| path.instance == gone) {
            path.broken = true;
        }
        self.hands.retain(|_, hand| hand.at != at);
        let lines: Vec<(usize, usize)> = self.lines.keys().filter(|(from, _)| *from == at).copied().collect();
        for key in lines {
            self.break_line(key);
        }
        let instance = Instance(gone.0 + SENDERS as u64);
        self.senders[at] = SenderNode {
            instance,
            stopped: false,
            sources: vec![SourceBlock::default(); SOURCES],
        };
        self.note(&[33, gone.0, instance.0]);
    }

    /// A process says and sends what its former life, or another process, was granted.
    pub(super) fn haunt(&mut self) {
        let Some((to, header, place, writer, wanted)) = self.dice.pick(&self.grants) else {
            return;
        };
        let (Some(epoch), instance) = (header.epoch, self.senders[place].instance) else {
            return;
        };
        if instance == writer || self.senders[place].stopped || wanted.is_empty() {
            return;
        }
        if let Some(line) = self
            .lines
            .get_mut(&(place, to))
            .filter(|line| line.instance == instance)
        {
            let (blocks, payload, digest) = (wanted.clone(), bytes::Bytes::new(), None);
            line.to_receiver.push_back((
                header,
                ToReceiver::Complete {
                    blocks,
                    payload,
                    digest,
                },
            ));
        }
        let Some(path) = self.path(place, to, PathKind::Tcp) else {
            return;
        };
        let connection = self.paths[&path].connections[0];
        let frame = Frame {
            number: self.number(),
            hand: 0,
            epoch,
            ordinal: wanted.start,
            layers: 0..LAYERS,
            destination: BlockId(0),
            source: (place, 0),
            remains: Some(None),
            applied: false,
        };
        if let Some(wire) = self.wires.get_mut(&connection) {
            wire.items.push_back(Item::Frame(frame));
        }
    }
}
