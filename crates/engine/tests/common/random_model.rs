//! Small random models as safetensors folders, the same as tests/golden/engine_random.py makes.

use half::{bf16, f16};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;

fn fnv1a(name: &str) -> u64 {
    name.bytes().fold(0xCBF2_9CE4_8422_2325, |h, byte| {
        (h ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3)
    })
}

/// Elements of one tensor, by its name alone.
pub fn weights(name: &str, shape: &[usize]) -> Vec<f32> {
    let seed = fnv1a(name);
    let count: usize = shape.iter().product();
    let scale = (4.0 / (shape[shape.len() - 1] as f64).sqrt()) as f32;
    (1..=count as u64)
        .map(|i| {
            let mut z = seed.wrapping_add(i.wrapping_mul(0x9E37_79B9_7F4A_7C15));
            z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            z ^= z >> 31;
            let u = (z >> 40) as f32 / 16_777_216.0 - 0.5;
            match name {
                _ if name.ends_with("norm.weight") => 1.0 + u * 0.5,
                _ if name.ends_with(".bias") => u * 0.5,
                _ => u * scale,
            }
        })
        .collect()
}

fn encode(values: &[f32], dtype: &str) -> (Dtype, Vec<u8>) {
    match dtype {
        "f32" => (Dtype::F32, values.iter().flat_map(|x| x.to_le_bytes()).collect()),
        "f16" => (
            Dtype::F16,
            values.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect(),
        ),
        "bf16" => (
            Dtype::BF16,
            values.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
        ),
        other => panic!("no such type: {other}"),
    }
}

/// Writes one model of engine_random.json into `folder`, in as many files as it says.
pub fn write(folder: &Path, model: &Value) {
    std::fs::write(folder.join("config.json"), model["config"].to_string()).unwrap();
    let dtype = model["dtype"].as_str().unwrap();
    let files = model["files"].as_u64().unwrap() as usize;
    let tensors: Vec<(String, Vec<usize>, Dtype, Vec<u8>)> = model["tensors"]
        .as_array()
        .unwrap()
        .iter()
        .map(|tensor| {
            let name = tensor[0].as_str().unwrap().to_owned();
            let shape: Vec<usize> = tensor[1]
                .as_array()
                .unwrap()
                .iter()
                .map(|n| n.as_u64().unwrap() as usize)
                .collect();
            let (dtype, bytes) = encode(&weights(&name, &shape), dtype);
            (name, shape, dtype, bytes)
        })
        .collect();
    let mut map = BTreeMap::new();
    for index in 0..files {
        let name = match files {
            1 => "model.safetensors".to_owned(),
            _ => format!("model-{:05}-of-{files:05}.safetensors", index + 1),
        };
        let mine = tensors
            .iter()
            .enumerate()
            .filter(|(i, _)| i % files == index)
            .map(|(_, tensor)| tensor);
        let views: Vec<(&str, TensorView<'_>)> = mine
            .map(|(name, shape, dtype, bytes)| (name.as_str(), TensorView::new(*dtype, shape.clone(), bytes).unwrap()))
            .collect();
        map.extend(views.iter().map(|(tensor, _)| ((*tensor).to_owned(), name.clone())));
        safetensors::serialize_to_file(views, None, &folder.join(name)).unwrap();
    }
    if files > 1 {
        let index = json!({"metadata": {}, "weight_map": map});
        std::fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
    }
}
