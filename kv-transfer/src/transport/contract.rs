//! The border between the endpoint, which knows hand-overs and grants, and the transports, which know bytes and connections.
//!
//! The receiver's book of grants ([`Landing`]) belongs to the endpoint; a transport asks it before it receives a payload and
//! tells it after. The sender's half is a [`Path`] per peer. Whatever a peer does, a transport writes into a block only
//! while it holds that block's [`Claim`], and says when it can hold none any more ([`Landing::fenced`], [`Landing::closed`]).

use crate::{PathKind, Peer};
use baton_types::{BlockId, Epoch, Instance, OutOfArena};
use futures::future::BoxFuture;
use std::any::Any;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

/// One connection that a writer opened to this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WriterConnection {
    /// The writer's process.
    pub instance: Instance,
    /// Which of its connections; never reused within a transport.
    pub connection: u64,
}

/// What a writer says of an extent before its bytes come.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ExtentHeader {
    /// The grant that it claims to write under.
    pub epoch: Epoch,
    /// Which block of the hand-over, from 0.
    pub ordinal: u32,
    /// Which layers of it. Not empty, within the geometry: transports check that.
    pub layers: Range<u32>,
    /// Bytes of payload: those of so many layers of one block. Transports check that too.
    pub len: u32,
}

/// Why the receiver does not take an extent. The transport discards the payload and goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Reject {
    /// No grant of that epoch lives here: never given, fenced, or committed.
    #[error("epoch is not live")]
    DeadEpoch,
    /// The epoch belongs to another writer.
    #[error("epoch belongs to another writer")]
    WrongWriter,
    /// The ordinal, the layers or the length lie outside the grant.
    #[error("extent lies outside its grant")]
    OutsideGrant,
    /// Some of it arrived before, or is arriving on another connection.
    #[error("extent arrived before")]
    Duplicate,
}

impl Reject {
    /// As a metric's label.
    pub fn name(self) -> &'static str {
        match self {
            Self::DeadEpoch => "dead_epoch",
            Self::WrongWriter => "wrong_writer",
            Self::OutsideGrant => "outside_grant",
            Self::Duplicate => "duplicate",
        }
    }
}

/// A receiver's book of grants, implemented by the endpoint, used by the receiving half of each transport. Calls are quick
/// and never wait.
pub trait Landing: Send + Sync + 'static {
    /// Asked before a payload is received: the epoch lives, the writer is the right one, the extent is inside the grant. The
    /// claim holds the block: it must not be given to anyone else while the claim lives, and no two living claims overlap (a
    /// second one for the same bytes is a [`Reject::Duplicate`]).
    ///
    /// # Errors
    /// Why the payload is to be discarded.
    fn claim(&self, from: &WriterConnection, header: &ExtentHeader) -> Result<Box<dyn Claim>, Reject>;

    /// As [`Self::claim`] for each of several extents, in order: one look into the book where there are thousands a
    /// millisecond.
    fn claim_all(&self, from: &WriterConnection, headers: &[ExtentHeader]) -> Box<dyn Claims> {
        let one = |header: &ExtentHeader| match self.claim(from, header)? {
            claim if claim.len() == header.len as usize => Ok(Some(claim)),
            _ => Err(Reject::OutsideGrant),
        };
        Box::new(OneByOne(headers.iter().map(one).collect()))
    }

    /// The in-band marker came: no later byte of that epoch comes on this connection, and this connection holds no claim of
    /// it.
    fn fenced(&self, from: &WriterConnection, epoch: Epoch);

    /// The payload was not what its checksum says. Nothing landed; the connection is closed next.
    fn corrupt(&self, from: &WriterConnection, header: &ExtentHeader);

    /// The connection is closed and its receiving task holds no claim any more. Called once, after everything else of it.
    fn closed(&self, from: &WriterConnection);
}

/// The right to write one extent's destination. Dropping it without [`Claim::land`] records nothing: the extent is torn.
pub trait Claim: Send {
    /// Where it goes.
    fn block(&self) -> BlockId;
    /// First byte within the block.
    fn offset(&self) -> usize;
    /// How many bytes; equal to the header's `len`.
    fn len(&self) -> usize;
    /// There are none; never so for a claim that a [`Landing`] gave.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// The whole payload is in the arena and its checksum is right: records the arrival, if the epoch still lives.
    ///
    /// # Errors
    /// Where the epoch died meanwhile; nothing is counted.
    fn land(self: Box<Self>) -> Result<(), Reject>;
}

/// Several claims that were asked for together. What holds for [`Claim`] holds for each of them.
pub trait Claims: Send {
    /// Where the extent goes, as many bytes as its header said, or why not. Numbered as they were asked for.
    ///
    /// # Errors
    /// Why its payload is to be discarded.
    fn place(&self, index: usize) -> Result<Place, Reject>;

    /// Ends all of them. Those for which `whole` says so are in the arena with right checksums and are recorded as by
    /// [`Claim::land`]; the others are torn. Gives one answer for each that was claimed and whole, in order.
    fn land(self: Box<Self>, whole: &[bool]) -> Vec<Result<(), Reject>>;
}

/// Where an extent goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Which block.
    pub block: BlockId,
    /// First byte within the block.
    pub offset: usize,
}

/// Claims that a book gives one by one. None: it ended.
struct OneByOne(Vec<Result<Option<Box<dyn Claim>>, Reject>>);

impl Claims for OneByOne {
    fn place(&self, index: usize) -> Result<Place, Reject> {
        match self.0.get(index) {
            Some(Ok(Some(claim))) => Ok(Place {
                block: claim.block(),
                offset: claim.offset(),
            }),
            Some(Err(reject)) => Err(*reject),
            Some(Ok(None)) | None => Err(Reject::OutsideGrant),
        }
    }

    fn land(self: Box<Self>, whole: &[bool]) -> Vec<Result<(), Reject>> {
        let claims = self.0.into_iter().zip(whole);
        // A claim that is not whole drops here, which is its end.
        let whole = claims.filter_map(|(claim, whole)| claim.ok().flatten().filter(|_| *whole));
        whole.map(Claim::land).collect()
    }
}

/// A transport of this process: it listens for writers, and connects to peers as a writer.
pub trait Transport: Send + Sync + 'static {
    /// Its kind.
    fn path(&self) -> PathKind;

    /// Where peers reach it, with its scheme: `tcp://host:port`, `memory://name`.
    fn address(&self) -> String;

    /// Whether that address of another node, of this transport's scheme, can lead anywhere from here. Another host's shared
    /// memory cannot, nor can another process's memory: they are passed over without a word.
    fn reaches(&self, _address: &str) -> bool {
        true
    }

    /// Opens a path to a peer at one of its addresses. Both ends check wire version, instances, fingerprint and geometry.
    ///
    /// # Errors
    /// Unreachable, too slow, refused with the field that differs, or another process at that address.
    fn connect(&self, peer: &Peer, address: &str) -> BoxFuture<'_, Result<Arc<dyn Path>, ConnectError>>;

    /// As a receiver: closes every connection of that writer and resolves when their receiving tasks are joined and
    /// [`Landing::closed`] was called for each. The fence of last resort.
    fn disconnect_instance(&self, instance: Instance) -> BoxFuture<'_, ()>;

    /// Stops listening, closes every connection of every writer as [`Self::disconnect_instance`] does, and joins all tasks.
    /// Paths that were opened from here end with an error at their next use.
    fn shutdown(&self) -> BoxFuture<'_, ()>;
}

/// Keeps a source block from changing: dropped when no write names the block any more.
pub type SourceClaim = Arc<dyn Any + Send + Sync>;

/// One piece of a block to send.
#[derive(Clone)]
pub struct Extent {
    /// Which block of the hand-over, from 0.
    pub ordinal: u32,
    /// Which layers of it.
    pub layers: Range<u32>,
    /// Where it is in this node's arena.
    pub source: BlockId,
    /// Where it goes in the receiver's arena, as its grant says. Only one-sided transports look: elsewhere the receiver
    /// itself finds the place by epoch and ordinal.
    pub destination: BlockId,
    /// Dropped when no send, copy or work request reads the bytes any more, or ever will.
    pub claim: SourceClaim,
}

impl std::fmt::Debug for Extent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Extent")
            .field("ordinal", &self.ordinal)
            .field("layers", &self.layers)
            .field("source", &self.source)
            .field("destination", &self.destination)
            .finish_non_exhaustive()
    }
}

/// The sender's half of one pair of processes: several connections, an extent stays on one of them.
pub trait Path: Send + Sync {
    /// Its kind.
    fn kind(&self) -> PathKind;

    /// How many connections it has, and so how many markers [`Self::fence`] sends. The receiver is told, because proof is a
    /// marker on each of them.
    fn connections(&self) -> u32;

    /// Sends extents. Resolves when all were applied at the destination, and waits first while too many bytes are in flight.
    /// Dropping the future stops what was not queued yet; what was, is sent.
    ///
    /// # Errors
    /// The path broke, was closed, or an extent is none (then nothing of the call was sent). After an error part of the
    /// extents may have been sent.
    fn write(&self, epoch: Epoch, extents: Vec<Extent>) -> BoxFuture<'static, Result<(), PathError>>;

    /// Sends the in-band marker behind all earlier writes, on every connection. Writes of that epoch that still wait for room
    /// fail with [`PathError::Fenced`]. Resolves when the markers were handed to the wire.
    ///
    /// # Errors
    /// The path broke or was closed: the receiver sees its connections close instead.
    fn fence(&self, epoch: Epoch) -> BoxFuture<'static, Result<(), PathError>>;

    /// Closes every connection, joins their tasks, and only then drops the claims of what was queued.
    fn close(&self) -> BoxFuture<'static, ()>;
}

/// Why a path did not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    /// It was closed on this side.
    #[error("the path was closed")]
    Closed,
    /// A connection ended.
    #[error("the connection was lost: {kind}")]
    Lost {
        /// What the system said.
        kind: std::io::ErrorKind,
    },
    /// The peer took nothing for too long.
    #[error("the peer took no bytes for {waited:?}")]
    Stalled {
        /// The bound.
        waited: Duration,
    },
    /// The epoch was fenced on this path before these extents were queued.
    #[error("{epoch:?} was fenced on this path")]
    Fenced {
        /// Which.
        epoch: Epoch,
    },
    /// No layers, or layers that the geometry does not have.
    #[error("layers {layers:?} of ordinal {ordinal} are none of a block's {of}")]
    NoSuchLayers {
        /// Of which block of the hand-over.
        ordinal: u32,
        /// What was given.
        layers: Range<u32>,
        /// How many there are.
        of: u32,
    },
    /// The source is outside the arena.
    #[error(transparent)]
    NoSuchBlock(#[from] OutOfArena),
}

impl PathError {
    /// Another path, or a new connection, can succeed.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Closed | Self::Lost { .. } | Self::Stalled { .. } => true,
            Self::Fenced { .. } | Self::NoSuchLayers { .. } | Self::NoSuchBlock(_) => false,
        }
    }
}

/// Why no path could be opened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConnectError {
    /// The address is not of this transport's form.
    #[error("`{address}` is no address of the {path} transport")]
    BadAddress {
        /// What was given.
        address: String,
        /// Whose form it should have.
        path: PathKind,
    },
    /// Nobody answers there, or the connection broke during the handshake.
    #[error("`{address}` cannot be reached: {kind}")]
    Unreachable {
        /// Where.
        address: String,
        /// What the system said.
        kind: std::io::ErrorKind,
    },
    /// No answer within the bound.
    #[error("`{address}` did not answer within {waited:?}")]
    Timeout {
        /// Where.
        address: String,
        /// The bound.
        waited: Duration,
    },
    /// The two nodes cannot hand KV to each other.
    #[error("peer refused: {field} is {ours} here and {theirs} there")]
    Refused {
        /// What differs.
        field: &'static str,
        /// This node's value.
        ours: String,
        /// The peer's value.
        theirs: String,
    },
    /// Another process than the one meant.
    #[error("process instance {found} answers where {wanted} was expected")]
    WrongInstance {
        /// Who was meant.
        wanted: Instance,
        /// Who answered.
        found: Instance,
    },
    /// What answers is no Baton node, or has no room for another writer.
    #[error("`{address}` broke the handshake: {reason}")]
    Handshake {
        /// Where.
        address: String,
        /// What was seen.
        reason: &'static str,
    },
    /// This transport is shutting down.
    #[error("this transport is shutting down")]
    ShuttingDown,
}

impl ConnectError {
    /// The same call can succeed later.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::Timeout { .. } | Self::Handshake { .. } => true,
            Self::BadAddress { .. } | Self::Refused { .. } | Self::WrongInstance { .. } | Self::ShuttingDown => false,
        }
    }
}
