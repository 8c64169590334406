//! The receivers: the pool, the roles, and what the books must say.

use super::super::planted::{self, Planted};
use super::*;

impl ReceiverNode {
    pub(super) fn new(life: u64) -> Self {
        let limits = Limits {
            layers: LAYERS,
            block_tokens: 1,
            paths: KINDS.to_vec(),
            peer_blocks: BLOCKS * 3 / 4,
            lease: LEASE,
            fence_timeout: FENCE,
            ageing: 200 * MS,
            handovers: 5,
            remembered: 4,
        };
        Self {
            life,
            machine: Receiver::new(limits),
            owners: vec![Owner::Pool; BLOCKS],
            cells: vec![[Cell::EMPTY; LAYERS as usize]; BLOCKS],
            reservations: BTreeMap::new(),
            writers: BTreeMap::new(),
            over: BTreeSet::new(),
            condemned: Vec::new(),
            comparisons: Vec::new(),
            roles: BTreeMap::new(),
            sequences: Vec::new(),
        }
    }

    fn shift(&mut self, epoch: Epoch, from: Owner, to: Owner) {
        for block in &self.reservations[&epoch].blocks {
            assert_eq!(self.owners[*block], from, "block {block} on its way to {to:?}");
            self.owners[*block] = to;
        }
    }

    /// Somebody writes this block under that epoch, now.
    pub(super) fn check_write(&self, block: BlockId, epoch: Epoch) {
        let owner = self.owners[block.index()];
        let its_own = owner == Owner::Reserved(epoch) || owner == Owner::Quarantined(epoch);
        assert!(its_own, "{epoch:?} is being written into a block of {owner:?}");
    }

    fn free(&self) -> Vec<usize> {
        (0..BLOCKS).filter(|block| self.owners[*block] == Owner::Pool).collect()
    }
}

impl World {
    pub(super) fn tell(&mut self, at: usize, event: Event) {
        self.receivers[at].machine.handle(self.now, event);
        self.settle(at);
    }

    pub(super) fn settle(&mut self, at: usize) {
        loop {
            let effects = self.receivers[at].machine.take_effects();
            if effects.is_empty() {
                break;
            }
            for effect in effects {
                self.perform(at, effect);
            }
        }
        self.receivers[at].machine.check();
    }

    fn perform(&mut self, at: usize, effect: Effect) {
        let no_quarantine = planted::is(Planted::NoQuarantine);
        let node = &mut self.receivers[at];
        match effect {
            Effect::Allocate { epoch, ticket } => self.allocate(at, epoch, ticket),
            Effect::Discard { epoch } => {
                self.note(&[1, at as u64, epoch.0]);
                self.receivers[at].shift(epoch, Owner::Reserved(epoch), Owner::Pool);
            }
            Effect::Regrant { old, new } => {
                node.shift(old, Owner::Reserved(old), Owner::Reserved(new));
                let mut reservation = node.reservations.remove(&old).expect("a reservation");
                reservation.chain.push(new);
                assert!(node.reservations.insert(new, reservation).is_none());
                node.over.insert(old);
                self.resumed += 1;
                self.note(&[2, at as u64, old.0, new.0]);
            }
            Effect::Verify { epoch, blocks, digest } => {
                node.comparisons.push((epoch, blocks, digest));
                self.note(&[3, at as u64, epoch.0, digest]);
            }
            Effect::Send { to, header, message } => self.send(at, to, header, message),
            Effect::Commit {
                ticket,
                attempt,
                epoch,
                held,
                ..
            } => {
                self.note(&[5, at as u64, epoch.0, u64::from(held)]);
                self.commit(at, ticket, attempt, epoch);
            }
            Effect::Failed { ticket, attempt, .. } => {
                let role = node.roles.get_mut(&ticket).expect("a role");
                assert!(role.open && role.attempt == attempt, "an attempt ended that was over");
                role.open = false;
                self.note(&[6, at as u64, ticket.0 as u64, u64::from(attempt.0)]);
            }
            Effect::Quarantine { epoch } => {
                let to = if no_quarantine {
                    Owner::Pool
                } else {
                    Owner::Quarantined(epoch)
                };
                node.shift(epoch, Owner::Reserved(epoch), to);
                node.over.insert(epoch);
                self.note(&[7, at as u64, epoch.0]);
            }
            Effect::Release { epoch } => {
                if !no_quarantine {
                    node.shift(epoch, Owner::Quarantined(epoch), Owner::Pool);
                }
                self.note(&[8, at as u64, epoch.0]);
            }
            Effect::Disconnect {
                instance,
                path,
                through,
            } => {
                node.condemned.push((instance, path, through));
                self.note(&[9, at as u64, instance.0, path as u64, through.0]);
            }
            Effect::Granted { epoch, .. } => self.note(&[10, at as u64, epoch.0]),
            Effect::FirstBlock { ticket } => self.note(&[11, at as u64, ticket.0 as u64]),
        }
    }

    fn allocate(&mut self, at: usize, epoch: Epoch, ticket: Ticket) {
        let node = &mut self.receivers[at];
        assert!(!node.writers.contains_key(&epoch), "{epoch:?} was used before");
        let (context, most_held) = node.roles.get(&ticket).map_or((1, 0), |role| (role.context, role.held));
        // What is cached comes and goes.
        let held = if self.dice.one_in(4) {
            self.dice.throw(most_held as usize + 1) as u32
        } else {
            most_held
        };
        let mut free = node.free();
        let wanted = (context + 1 - held) as usize;
        let answer = if free.len() < wanted {
            Event::NoRoom { epoch }
        } else {
            let first = self.dice.throw(free.len());
            free.rotate_left(first);
            free.truncate(wanted);
            free.iter()
                .for_each(|block| node.owners[*block] = Owner::Reserved(epoch));
            let fresh = free.iter().map(|block| BlockId(*block as u32)).collect();
            let reservation = Reservation {
                held,
                blocks: free,
                chain: vec![epoch],
            };
            node.reservations.insert(epoch, reservation);
            Event::Allocated { epoch, held, fresh }
        };
        self.note(&[12, at as u64, epoch.0]);
        self.receivers[at].machine.handle(self.now, answer);
    }

    fn send(&mut self, at: usize, to: Instance, header: Header, message: ToSender) {
        let node = &mut self.receivers[at];
        let kind = match &message {
            ToSender::Grant { wanted, .. } => {
                let epoch = header.epoch.expect("a grant names its epoch");
                let before = node.writers.insert(epoch, to);
                assert!(before.is_none_or(|before| before == to), "{epoch:?} has two writers");
                if let Some(place) = (0..SENDERS).find(|place| self.senders[*place].instance == to) {
                    self.grants.push((at, header, place, to, wanted.clone()));
                }
                0
            }
            ToSender::Refused { .. } => 1,
            ToSender::Committed => 2,
            ToSender::Fence { .. } => {
                node.over.extend(header.epoch);
                3
            }
        };
        self.note(&[4, at as u64, to.0, kind, header.epoch.map_or(0, |epoch| epoch.0)]);
        let line = self
            .lines
            .iter_mut()
            .find(|((_, receiver), line)| *receiver == at && line.instance == to);
        if let Some((_, line)) = line {
            line.to_sender.push_back((header, message));
        }
    }

    fn commit(&mut self, at: usize, ticket: Ticket, attempt: Attempt, epoch: Epoch) {
        let node = &mut self.receivers[at];
        let role = node.roles.remove(&ticket).expect("a role");
        assert!(
            role.open && role.attempt == attempt,
            "an attempt was committed that was over"
        );
        node.shift(epoch, Owner::Reserved(epoch), Owner::Sequence(ticket));
        let reservation = node.reservations.remove(&epoch).expect("a reservation");
        for (ordinal, block) in (reservation.held..role.context).zip(&reservation.blocks) {
            for cell in &node.cells[*block] {
                let right =
                    cell.value == Some((ticket, ordinal)) && !cell.torn && reservation.chain.contains(&cell.by.1);
                assert!(
                    right,
                    "{ticket:?} was committed with block {ordinal} of {cell:?}, under {:?}",
                    reservation.chain
                );
            }
        }
        let cells = reservation.blocks.iter().map(|block| node.cells[*block]).collect();
        node.sequences.push((ticket, reservation.blocks, cells));
        self.commits += 1;
    }

    /// A sequence ends: nobody has written its blocks meanwhile.
    pub(super) fn end_sequence(&mut self, at: usize, which: usize) {
        let node = &mut self.receivers[at];
        let (ticket, blocks, cells) = node.sequences.swap_remove(which);
        for (block, cells) in blocks.iter().zip(cells) {
            assert_eq!(node.owners[*block], Owner::Sequence(ticket));
            assert_eq!(node.cells[*block], cells, "a block was written after its commit");
            node.owners[*block] = Owner::Pool;
        }
        self.tell(at, Event::RoomChanged);
    }

    pub(super) fn compare(&mut self, at: usize, which: usize) {
        let node = &mut self.receivers[at];
        let (epoch, blocks, digest) = node.comparisons.swap_remove(which);
        let mut made = 0_u64;
        for (ordinal, block) in blocks {
            for (layer, cell) in (0..).zip(&node.cells[block.index()]) {
                made = made.wrapping_add(mix(ordinal, layer, cell.crc(layer)));
            }
        }
        let matches = made == digest;
        self.refused_digests += usize::from(!matches);
        self.tell(at, Event::Verified { epoch, matches });
    }

    /// A request comes to a receiver.
    pub(super) fn expect(&mut self, at: usize) -> Option<Ticket> {
        let ticket = Ticket(self.tickets + 1);
        if self.tickets == TICKETS || self.receivers[at].machine.may_expect(ticket).is_err() {
            return None;
        }
        self.tickets += 1;
        let context = self.dice.throw(4) as u32;
        let held = if self.dice.one_in(3) {
            self.dice.throw(context as usize + 1) as u32
        } else {
            0
        };
        let deadline = self.now + MS * (500 + self.dice.throw(2500)) as u32;
        let role = Role {
            attempt: Attempt::FIRST,
            open: true,
            context,
            held,
            deadline,
        };
        self.receivers[at].roles.insert(ticket, role);
        self.tell(
            at,
            Event::Expect {
                ticket,
                attempt: Attempt::FIRST,
                blocks: context + 1,
                context_tokens: u64::from(context),
                deadline,
            },
        );
        Some(ticket)
    }

    /// The role gives its request to the next attempt.
    pub(super) fn supersede(&mut self, at: usize, ticket: Ticket) -> Option<Attempt> {
        let role = self.receivers[at].roles.get_mut(&ticket)?;
        let attempt = role.attempt.next();
        (role.attempt, role.open) = (attempt, true);
        self.tell(at, Event::Supersede { ticket, attempt });
        Some(attempt)
    }

    pub(super) fn forget(&mut self, at: usize, ticket: Ticket) {
        self.receivers[at].roles.remove(&ticket);
        self.tell(at, Event::Forget { ticket });
    }

    /// The process ends, and another takes its place.
    pub(super) fn restart_receiver(&mut self, at: usize) {
        let life = self.receivers[at].life + 1;
        self.receivers[at] = ReceiverNode::new(life);
        self.grants.retain(|(receiver, ..)| *receiver != at);
        self.unseen_by_receiver.retain(|(receiver, _)| *receiver != at);
        let lines: Vec<(usize, usize)> = self.lines.keys().filter(|(_, to)| *to == at).copied().collect();
        for key in lines {
            if let Some(line) = self.lines.remove(&key) {
                self.unseen_by_sender.push((key.0, at, line.instance));
            }
        }
        for path in self.paths.values_mut().filter(|path| path.to == at) {
            path.broken = true;
        }
        let wires: Vec<u64> = self
            .wires
            .iter()
            .filter(|(_, wire)| wire.to == at)
            .map(|(number, _)| *number)
            .collect();
        for number in wires {
            self.drop_wire(number);
        }
    }
}
