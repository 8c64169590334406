//! One step of a schedule, drawn from what can happen now.

use super::*;

impl World {
    pub(super) fn step(&mut self) {
        let which = self.dice.throw(1000);
        self.note(&[40, which as u64]);
        match which {
            0..40 => self.new_request(),
            40..420 => self.work_somewhere(),
            420..600 => self.message_somewhere(),
            600..830 => self.frame_somewhere(),
            830..880 => self.answer_somewhere(),
            880..910 => self.advance(),
            910..930 => self.roles_act(),
            930..950 => self.sequence_ends(),
            _ if self.calm || !self.dice.one_in(self.mildness) => {}
            950..953 => self.supersede_somewhere(),
            953..960 => self.path_breaks(),
            960..966 => self.close_somewhere(),
            966..970 => self.line_breaks(),
            970..976 => self.stop_or_go_on(),
            976..979 => self.end_a_sender(),
            979..980 => self.end_a_receiver(),
            980..984 => self.give_up(),
            984..992 => self.path_breaks(),
            _ => self.haunt(),
        }
    }

    fn new_request(&mut self) {
        let to = self.dice.throw(RECEIVERS);
        if let Some(ticket) = self.expect(to) {
            let at = self.dice.throw(SENDERS);
            self.open_hand(at, to, ticket);
        }
    }

    fn work_somewhere(&mut self) {
        let hands: Vec<u64> = self.hands.keys().copied().collect();
        if let Some(hand) = self.dice.pick(&hands) {
            self.work(hand);
        }
    }

    fn message_somewhere(&mut self) {
        let lines: Vec<(usize, usize)> = self.lines.keys().copied().collect();
        if let Some(key) = self.dice.pick(&lines) {
            let to_receiver = self.dice.one_in(2);
            self.deliver_message(key, to_receiver);
        }
    }

    fn frame_somewhere(&mut self) {
        let busy = |wire: &Wire| !wire.items.is_empty() || wire.receiving.is_some();
        let wires: Vec<u64> = self
            .wires
            .iter()
            .filter(|(_, wire)| busy(wire))
            .map(|(number, _)| *number)
            .collect();
        let Some(number) = self.dice.pick(&wires) else { return };
        if self.wires[&number].from.path == PathKind::Shm && self.dice.one_in(2) {
            self.land_one_sided(number);
        } else {
            self.deliver(number);
        }
    }

    /// What was asked for and takes its time: proofs, comparisons, ends of lines, closed connections.
    fn answer_somewhere(&mut self) {
        let to = self.dice.throw(RECEIVERS);
        let node = &self.receivers[to];
        let (condemned, comparisons) = (node.condemned.len(), node.comparisons.len());
        match self.dice.throw(5) {
            0 if condemned > 0 => {
                let which = self.dice.throw(condemned);
                self.disconnected(to, which);
            }
            1 if comparisons > 0 => {
                let which = self.dice.throw(comparisons);
                self.compare(to, which);
            }
            2 if !self.unseen_by_receiver.is_empty() => {
                let which = self.dice.throw(self.unseen_by_receiver.len());
                self.receiver_sees(which);
            }
            3 if !self.unseen_by_sender.is_empty() => {
                let which = self.dice.throw(self.unseen_by_sender.len());
                let stopped = self.senders[self.unseen_by_sender[which].0].stopped;
                if !stopped {
                    self.sender_sees(which);
                }
            }
            _ => {
                let closing = |wire: &Wire| wire.closing && self.can_close(wire.from.path, wire.from.writer);
                let wires: Vec<u64> = self
                    .wires
                    .iter()
                    .filter(|(_, wire)| closing(wire))
                    .map(|(number, _)| *number)
                    .collect();
                if let Some(number) = self.dice.pick(&wires) {
                    self.close_wire(number);
                }
            }
        }
    }

    /// Time passes: little, or to when something is due.
    pub(super) fn advance(&mut self) {
        let due = self.next_due();
        let step = MS * (1 + self.dice.throw(40)) as u32;
        self.now = match self.dice.throw(4) {
            0 if due > self.now && due < self.now + 500 * MS => due,
            _ => self.now + step,
        };
        self.tick();
    }

    pub(super) fn next_due(&self) -> Duration {
        let receivers = self.receivers.iter().map(|node| node.machine.next_tick());
        let running = |hand: &&Hand| !self.senders[hand.at].stopped;
        let hands = self.hands.values().filter(running).map(|hand| hand.machine.next_tick());
        receivers.chain(hands).min().unwrap_or(Duration::MAX)
    }

    fn tick(&mut self) {
        for to in 0..RECEIVERS {
            if self.receivers[to].machine.next_tick() <= self.now {
                self.tell(to, Event::Tick);
            }
            for (ticket, role) in &self.receivers[to].roles {
                assert!(
                    !role.open || self.now < role.deadline,
                    "{ticket:?} outlived its deadline"
                );
            }
        }
        let hands: Vec<u64> = self.hands.keys().copied().collect();
        for number in hands {
            let Some(hand) = self.hands.get(&number).filter(|hand| !self.senders[hand.at].stopped) else {
                continue;
            };
            if hand.machine.next_tick() <= self.now {
                self.bring(number, SenderEvent::Tick);
            }
        }
        for hand in self.hands.values().filter(|hand| !self.senders[hand.at].stopped) {
            let in_time = hand.machine.outcome().is_some() || self.now < hand.deadline;
            assert!(
                in_time,
                "{:?} of {:?} outlived its deadline at its sender",
                hand.attempt, hand.ticket
            );
        }
    }

    /// A role whose attempt failed names the next one, or gives up; one may do so before.
    fn roles_act(&mut self) {
        let to = self.dice.throw(RECEIVERS);
        let failed: Vec<Ticket> = self.receivers[to]
            .roles
            .iter()
            .filter(|(_, role)| !role.open)
            .map(|(t, _)| *t)
            .collect();
        let Some(ticket) = self.dice.pick(&failed) else { return };
        let attempts = self.receivers[to].roles[&ticket].attempt.0;
        let in_time = self.receivers[to].roles[&ticket].deadline > self.now;
        if attempts < 4 && in_time && !self.calm && !self.dice.one_in(4) {
            self.next_attempt(to, ticket);
        } else {
            self.forget(to, ticket);
        }
    }

    fn next_attempt(&mut self, to: usize, ticket: Ticket) {
        if self.supersede(to, ticket).is_some() {
            let at = self.dice.throw(SENDERS);
            self.open_hand(at, to, ticket);
        }
    }

    fn supersede_somewhere(&mut self) {
        let to = self.dice.throw(RECEIVERS);
        let tickets: Vec<Ticket> = self.receivers[to]
            .roles
            .iter()
            .filter(|(_, role)| role.attempt.0 < 4 && role.deadline > self.now)
            .map(|(t, _)| *t)
            .collect();
        if let Some(ticket) = self.dice.pick(&tickets) {
            self.next_attempt(to, ticket);
        }
    }

    fn sequence_ends(&mut self) {
        let to = self.dice.throw(RECEIVERS);
        let sequences = self.receivers[to].sequences.len();
        if sequences > 0 {
            let which = self.dice.throw(sequences);
            self.end_sequence(to, which);
        }
    }

    fn path_breaks(&mut self) {
        let whole: Vec<u64> = self
            .paths
            .iter()
            .filter(|(_, path)| !path.broken)
            .map(|(number, _)| *number)
            .collect();
        if let Some(path) = self.dice.pick(&whole) {
            self.break_path(path);
        }
    }

    /// A connection breaks at the receiver's end.
    fn close_somewhere(&mut self) {
        let wires: Vec<u64> = self
            .wires
            .iter()
            .filter(|(_, wire)| self.can_close(wire.from.path, wire.from.writer))
            .map(|(number, _)| *number)
            .collect();
        if let Some(number) = self.dice.pick(&wires) {
            self.close_wire(number);
        }
    }

    fn line_breaks(&mut self) {
        let lines: Vec<(usize, usize)> = self.lines.keys().copied().collect();
        if let Some(key) = self.dice.pick(&lines) {
            self.break_line(key);
        }
    }

    fn stop_or_go_on(&mut self) {
        let at = self.dice.throw(SENDERS);
        let stopped = &mut self.senders[at].stopped;
        *stopped = !*stopped && self.dice.one_in(2);
        self.tick();
    }

    fn end_a_sender(&mut self) {
        let at = self.dice.throw(SENDERS);
        self.restart_sender(at);
    }

    fn end_a_receiver(&mut self) {
        let to = self.dice.throw(RECEIVERS);
        self.restart_receiver(to);
        self.note(&[41, to as u64, self.receivers[to].life]);
    }

    /// A role gives up, on either side.
    fn give_up(&mut self) {
        let hands: Vec<u64> = self.hands.keys().copied().collect();
        if let Some(number) = self.dice.pick(&hands).filter(|_| self.dice.one_in(2)) {
            let stopped = self
                .hands
                .get(&number)
                .is_some_and(|hand| self.senders[hand.at].stopped);
            if !stopped {
                let reason = "given up".to_owned();
                let error = TransferError::Aborted { reason };
                self.bring(number, SenderEvent::Abort { error });
            }
            return;
        }
        let to = self.dice.throw(RECEIVERS);
        let tickets: Vec<Ticket> = self.receivers[to].roles.keys().copied().collect();
        if let Some(ticket) = self.dice.pick(&tickets) {
            self.forget(to, ticket);
        }
    }
}
