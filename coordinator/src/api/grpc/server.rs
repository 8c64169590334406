//! The listener, the services on it, and the request id that every response carries.

use super::admin::AdminService;
use super::health;
use super::inference::InferenceService;
use crate::StartError;
use crate::control::Control;
use crate::driver::Coordinator;
use axum::extract::Request;
use axum::middleware::{self, Next};
use axum::response::Response;
use baton_cluster_state::Store;
use baton_node_runtime::{CancellationToken, Readiness, Supervisor};
use baton_proto::DESCRIPTORS;
use baton_proto::v1::admin_server::AdminServer;
use baton_proto::v1::inference_server::InferenceServer;
use baton_types::RequestId;
use http::{HeaderName, HeaderValue};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tonic::service::Routes;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;

/// The door's task, by which the end of its streams is seen.
pub(crate) const TASK: &str = "grpc-door";
/// A client that answers no ping for this long, and as long again, is gone.
const KEEP_ALIVE: Duration = Duration::from_secs(5);

/// What the door needs.
pub(crate) struct DoorOptions {
    pub(crate) coordinator: Coordinator,
    pub(crate) control: Control,
    pub(crate) store: Store,
    pub(crate) store_name: String,
    pub(crate) body_bytes_max: usize,
    /// Calls at once on one connection.
    pub(crate) streams_max: u32,
    pub(crate) readiness: Readiness,
}

/// Serves on `listener` until `doors` is cancelled and each stream has ended, or the supervisor ends.
pub(crate) fn serve(
    listener: TcpListener,
    options: DoorOptions,
    supervisor: &Supervisor,
    doors: CancellationToken,
) -> Result<(), StartError> {
    let DoorOptions {
        coordinator,
        control,
        store,
        store_name,
        body_bytes_max,
        streams_max,
        readiness,
    } = options;
    let (reporter, health_service) = tonic_health::server::health_reporter();
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()
        .map_err(|error| StartError::Reflection {
            reason: error.to_string(),
        })?;
    let admin = AdminService {
        coordinator: coordinator.clone(),
        control,
        store,
        store_name,
        supervisor: supervisor.clone(),
    };
    let inference = InferenceService(Arc::new(coordinator.clone()));
    let routes = Routes::new(InferenceServer::new(inference).max_decoding_message_size(body_bytes_max))
        .add_service(AdminServer::new(admin))
        .add_service(health_service)
        .add_service(reflection);
    let routes = Routes::from(routes.into_axum_router().layer(middleware::from_fn(name)));
    supervisor.spawn(
        "health",
        health::follow(coordinator, reporter, readiness, doors.clone()),
    );
    let (shutdown, failing) = (supervisor.shutdown_token(), supervisor.clone());
    supervisor.spawn(TASK, async move {
        let serving = Server::builder()
            .http2_keepalive_interval(Some(KEEP_ALIVE))
            .http2_keepalive_timeout(Some(KEEP_ALIVE))
            .max_concurrent_streams(Some(streams_max))
            .add_routes(routes)
            .serve_with_incoming_shutdown(
                TcpIncoming::from(listener).with_nodelay(Some(true)),
                doors.cancelled_owned(),
            );
        tokio::select! {
            () = shutdown.cancelled() => {}
            result = serving => {
                if let Err(error) = result {
                    failing.fail(format!("the gRPC door failed: {error}"));
                }
            }
        }
    });
    Ok(())
}

/// Draws the request's id, which the response carries whatever becomes of it.
async fn name(mut request: Request, next: Next) -> Response {
    let request_id = RequestId::random();
    request.extensions_mut().insert(request_id);
    let mut response = next.run(request).await;
    let id = HeaderValue::try_from(request_id.to_string()).expect("hexadecimal digits are a header value");
    response
        .headers_mut()
        .insert(HeaderName::from_static("x-request-id"), id);
    response
}
