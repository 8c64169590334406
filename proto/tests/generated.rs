//! The generated code in `src/generated` is what today's `.proto` files give. `BATON_REGENERATE=1` writes it anew.

use prost::Message;
use std::path::Path;

const FILES: [&str; 4] = [
    "baton/v1/common.proto",
    "baton/v1/inference.proto",
    "baton/v1/admin.proto",
    "baton/v1/node.proto",
];

#[test]
fn generated_code_matches_the_proto_files() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let descriptors = protox::Compiler::new([root.join("proto")])
        .expect("proto folder exists")
        .include_imports(true)
        .include_source_info(true)
        .open_files(FILES)
        .expect("the .proto files compile")
        .file_descriptor_set();
    let out = tempfile::tempdir().expect("temporary folder");
    tonic_prost_build::configure()
        .out_dir(out.path())
        .bytes(".baton.v1")
        .compile_fds(descriptors.clone())
        .expect("code generation");
    let fresh = std::fs::read_to_string(out.path().join("baton.v1.rs")).expect("one package, one file");
    // Reflection needs no comments: without source info the set is a tenth of the size.
    let mut bare = descriptors;
    bare.file.iter_mut().for_each(|file| file.source_code_info = None);
    let set = bare.encode_to_vec();

    let code = root.join("src/generated/baton.v1.rs");
    let binary = root.join("src/generated/descriptors.binpb");
    if std::env::var_os("BATON_REGENERATE").is_some() {
        std::fs::write(&code, &fresh).expect("write generated code");
        std::fs::write(&binary, &set).expect("write descriptor set");
    }
    let hint = "run BATON_REGENERATE=1 cargo test -p baton-proto --test generated";
    assert!(
        std::fs::read_to_string(&code).unwrap_or_default() == fresh,
        "src/generated/baton.v1.rs is stale: {hint}"
    );
    assert!(
        std::fs::read(&binary).unwrap_or_default() == set,
        "src/generated/descriptors.binpb is stale: {hint}"
    );
}
