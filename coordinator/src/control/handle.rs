//! The controller of one coordinator, for those who start it and ask it.

use super::runner::{Runner, State};
use super::{ControlMode, ControlPlan};
use crate::driver::Coordinator;
use baton_cluster_state::{AdviceRecord, Standing, Store, StoreError};
use baton_node_runtime::{Clock, Supervisor};
use std::sync::{Arc, Mutex, PoisonError};

/// The controller of this coordinator, for those who ask it. Clones are one; the default is off.
#[derive(Clone, Default)]
pub(crate) struct Control(Option<Arc<Shared>>);

/// What the loop tells those who ask.
pub(super) struct Shared {
    mode: ControlMode,
    store: Store,
    pub(super) standing: Mutex<Standing>,
    pub(super) latest: Mutex<Option<AdviceRecord>>,
}

/// What can be said of it.
pub(crate) struct ControlStatus {
    pub(crate) mode: ControlMode,
    pub(crate) standing: Standing,
    /// What the leader came to last.
    pub(crate) advice: Option<AdviceRecord>,
}

impl Control {
    /// Starts the controller of a coordinator.
    pub(crate) fn start(
        plan: ControlPlan,
        coordinator: &Coordinator,
        store: &Store,
        clock: Clock,
        supervisor: &Supervisor,
    ) -> Self {
        let shared = Arc::new(Shared {
            mode: plan.mode,
            store: store.clone(),
            standing: Mutex::new(Standing::Unknown),
            latest: Mutex::default(),
        });
        let runner = Runner {
            plan,
            coordinator: coordinator.clone(),
            store: store.clone(),
            candidacy: store.stand(coordinator.instance()),
            shared: Arc::clone(&shared),
            clock,
            supervisor: supervisor.clone(),
            state: State::default(),
        };
        supervisor.spawn("control", runner.run(supervisor.shutdown_token()));
        Self(Some(shared))
    }

    /// What can be said of it; none where it is off. One that does not lead asks the store.
    ///
    /// # Errors
    /// Where the store fails.
    pub(crate) async fn status(&self) -> Result<Option<ControlStatus>, StoreError> {
        let Some(shared) = &self.0 else { return Ok(None) };
        let standing = *shared.standing.lock().unwrap_or_else(PoisonError::into_inner);
        let own = || shared.latest.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let advice = match standing {
            Standing::Leads { .. } => own(),
            Standing::Follows(_) | Standing::Unknown => shared.store.advice().await?,
        };
        Ok(Some(ControlStatus {
            mode: shared.mode,
            standing,
            advice,
        }))
    }
}
