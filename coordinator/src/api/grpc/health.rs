//! Tells load balancers and operators whether requests would be taken: gRPC health and the admin port's readiness follow
//! the members.

use crate::Frontend;
use crate::driver::Coordinator;
use baton_node_runtime::{CancellationToken, Readiness};
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

/// Follows the members until the doors close.
pub(super) async fn follow(
    coordinator: Coordinator,
    reporter: HealthReporter,
    readiness: Readiness,
    doors: CancellationToken,
) {
    let mut changes = coordinator.members().changes();
    let mut shown = None;
    // Operators are answered whatever the nodes do.
    reporter
        .set_service_status("baton.v1.Admin", ServingStatus::Serving)
        .await;
    loop {
        changes.mark_unchanged();
        let serving = !coordinator.models().is_empty();
        if shown != Some(serving) {
            shown = Some(serving);
            let status = if serving {
                ServingStatus::Serving
            } else {
                ServingStatus::NotServing
            };
            reporter.set_service_status("", status).await;
            reporter.set_service_status("baton.v1.Inference", status).await;
            readiness.set(serving, if serving { "ready" } else { "no decode node is ready" });
        }
        tokio::select! {
            biased;
            () = doors.cancelled() => break,
            () = changes.changed() => {}
        }
    }
    for service in ["", "baton.v1.Inference", "baton.v1.Admin"] {
        reporter.set_service_status(service, ServingStatus::NotServing).await;
    }
}
