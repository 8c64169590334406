//! How clients ask for a form of the answer, and what they are told where they ask wrongly.

use super::fields::Fields;
use super::grammar::take;
use super::request::{Kind, parse};
use crate::{ApiCode, ApiError};
use baton_types::{Grammar, RequestId};
use serde_json::{Value, json};

fn taken(body: &Value) -> Result<Option<(Grammar, &'static str)>, (String, String)> {
    let mut fields = Fields::of_body(body.to_string().as_bytes()).unwrap();
    take(&mut fields)
        .map(|asked| asked.map(|asked| (asked.grammar, asked.field)))
        .map_err(|error| (error.param.unwrap_or_default(), error.message))
}

#[test]
fn each_form_is_read() {
    let any = Grammar::JsonSchema(r#"{"type":"object"}"#.into());
    // The order of properties is the schema's.
    let schema = json!({"type": "object", "properties": {"z": {}, "a": {}}});
    let named = Grammar::JsonSchema(r#"{"type":"object","properties":{"z":{},"a":{}}}"#.into());
    for (body, expected) in [
        (json!({}), None),
        (json!({"response_format": null, "structured_outputs": null}), None),
        (json!({"response_format": {"type": "text"}}), None),
        (
            json!({"response_format": {"type": "json_object"}}),
            Some((any.clone(), "response_format")),
        ),
        (
            json!({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": true}}}),
            Some((named.clone(), "response_format.json_schema.schema")),
        ),
        (
            json!({"structured_outputs": {"json": schema}}),
            Some((named.clone(), "structured_outputs.json")),
        ),
        (
            json!({"structured_outputs": {"json": schema.to_string()}}),
            Some((named, "structured_outputs.json")),
        ),
        (
            json!({"structured_outputs": {"regex": "a|b"}}),
            Some((Grammar::Regex("a|b".into()), "structured_outputs.regex")),
        ),
        (
            json!({"structured_outputs": {"json_object": true}}),
            Some((any, "structured_outputs.json_object")),
        ),
    ] {
        assert_eq!(taken(&body), Ok(expected), "{body}");
    }
}

#[test]
fn mistakes_are_named() {
    let format = |value: Value| json!({"response_format": value});
    for (body, param) in [
        (format(json!("json")), "response_format"),
        (format(json!({})), "response_format.type"),
        (format(json!({"type": "xml"})), "response_format.type"),
        (
            format(json!({"type": "json_object", "schema": {}})),
            "response_format.schema",
        ),
        (format(json!({"type": "json_schema"})), "response_format.json_schema"),
        (
            format(json!({"type": "json_schema", "json_schema": {"schema": {}}})),
            "response_format.json_schema.name",
        ),
        (
            format(json!({"type": "json_schema", "json_schema": {"name": "n"}})),
            "response_format.json_schema.schema",
        ),
        (
            json!({"structured_outputs": {"choice": ["a"]}}),
            "structured_outputs.choice",
        ),
        (json!({"structured_outputs": {"regex": 1}}), "structured_outputs.regex"),
        (
            json!({"structured_outputs": {"regex": "a", "json": {}}}),
            "structured_outputs",
        ),
        (
            json!({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}),
            "structured_outputs",
        ),
    ] {
        let (found, message) = taken(&body).unwrap_err();
        assert!(found == param && message.contains(param), "{body}: {found}, {message}");
    }
}

#[test]
fn what_is_found_behind_the_door_has_the_clients_name() {
    let body = json!({"model": "m", "prompt": "hi", "structured_outputs": {"regex": "("}});
    let asked = parse(Kind::Completion, RequestId(1), body.to_string().as_bytes()).unwrap();
    let refused = ApiError::new(ApiCode::InvalidArgument, "regex: it is not supported: unclosed group");
    let refused = ApiError {
        field: Some("regex".into()),
        ..refused
    };
    let error = asked.renamed(refused.into());
    assert_eq!(error.param.as_deref(), Some("structured_outputs.regex"));
    assert_eq!(
        error.message,
        "`structured_outputs.regex`: it is not supported: unclosed group"
    );
    let ignoring = json!({"model": "m", "prompt": "hi", "ignore_eos": true, "structured_outputs": {"regex": "a"}});
    let error = parse(Kind::Completion, RequestId(1), ignoring.to_string().as_bytes()).unwrap_err();
    assert_eq!(error.param.as_deref(), Some("ignore_eos"));
}
