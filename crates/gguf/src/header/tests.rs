use super::*;
use crate::Value;
use proptest::prelude::*;

const KEPT_MAX: u64 = 4;

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

fn array(kind: u32, count: u64, elements: &[u8]) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &count.to_le_bytes(), elements].concat()
}

/// A file, field by field.
struct File {
    metadata: Vec<(String, u32, Vec<u8>)>,
    /// Name, dimensions (innermost first), type, offset.
    tensors: Vec<(String, Vec<u64>, u32, u64)>,
    data: usize,
}

impl File {
    fn sample() -> Self {
        let texts = [text("a"), text("bc")].concat();
        let metadata = [
            ("general.architecture", 8, text("llama")),
            ("llama.context_length", 4, 8192u32.to_le_bytes().to_vec()),
            ("tokenizer.ggml.tokens", 9, array(8, 2, &texts)),
            ("flag", 7, vec![1]),
            ("small", 1, vec![0xFF]),
            ("half", 6, 0.5f32.to_le_bytes().to_vec()),
            ("per layer", 9, array(3, 2, &[1, 0, 0xFE, 0xFF])),
            ("long", 9, array(4, 5, &[7; 20])),
            ("floats", 9, array(6, 1, &[0; 4])),
            ("nested", 9, array(9, 1, &array(8, 2, &texts))),
        ];
        Self {
            metadata: metadata.map(|(key, kind, value)| (key.to_owned(), kind, value)).into(),
            tensors: vec![
                ("matrix".into(), vec![32, 2], 2, 0),
                ("vector".into(), vec![3], 0, 64),
                ("other".into(), vec![7], 14, 96),
            ],
            data: 96,
        }
    }

    fn put(&mut self, key: &str, kind: u32, value: &[u8]) {
        self.metadata.push((key.into(), kind, value.to_vec()));
    }

    /// All of it, and how long the metadata are.
    fn parts(&self) -> (Vec<u8>, usize) {
        let mut out = b"GGUF\x03\0\0\0".to_vec();
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, kind, value) in &self.metadata {
            out.extend([&text(key)[..], &kind.to_le_bytes(), value].concat());
        }
        let metadata = out.len();
        for (name, shape, kind, offset) in &self.tensors {
            out.extend(text(name));
            out.extend((shape.len() as u32).to_le_bytes());
            out.extend(shape.iter().flat_map(|n| n.to_le_bytes()));
            out.extend(kind.to_le_bytes());
            out.extend(offset.to_le_bytes());
        }
        out.resize(out.len().next_multiple_of(32) + self.data, 0);
        (out, metadata)
    }
}

/// f32, and Q4_0.
fn layout(kind: u32) -> Option<Layout> {
    let (block_elements, block_bytes) = [(1, 4), (0, 0), (32, 18)].get(kind as usize).copied()?;
    (block_elements > 0).then_some(Layout {
        block_elements,
        block_bytes,
    })
}

fn header(bytes: &[u8]) -> Result<Header, ReadError> {
    read_header(bytes, bytes.len() as u64, KEPT_MAX, layout)
}

fn metadata_of(bytes: &[u8]) -> Result<Metadata, ReadError> {
    read_metadata(bytes, bytes.len() as u64, KEPT_MAX)
}

/// Of the changed sample: the part and its flaw.
fn flaw(change: impl FnOnce(&mut File)) -> (String, Flaw) {
    let mut file = File::sample();
    change(&mut file);
    match header(&file.parts().0) {
        Err(ReadError::Corrupt { field, flaw }) => (field.to_string(), flaw),
        other => panic!("{other:?}"),
    }
}

#[test]
fn values_are_found_by_key() {
    let metadata = metadata_of(&File::sample().parts().0).unwrap();
    let texts = Value::Texts(vec!["a".into(), "bc".into()]);
    for (key, value) in [
        ("general.architecture", Value::Text("llama".into())),
        ("llama.context_length", Value::Integer(8192)),
        ("tokenizer.ggml.tokens", texts),
        ("flag", Value::Bool(true)),
        ("small", Value::Integer(-1)),
        ("half", Value::Float(0.5)),
        ("per layer", Value::Integers(vec![1, -2])),
        ("long", Value::Skipped),
        ("floats", Value::Skipped),
        ("nested", Value::Skipped),
    ] {
        assert_eq!(metadata.get(key), Some(&value), "{key}");
    }
    assert_eq!(metadata.get("absent"), None);
    assert_eq!(metadata.get("small").unwrap().as_u32(), None);
    assert_eq!(metadata.get("flag").unwrap().as_text(), None);
}

#[test]
fn values_are_short_in_messages() {
    let long = Value::Text("ä".repeat(1000)).to_string();
    assert!(long.len() < 200 && long.ends_with("and more"), "{long}");
    assert_eq!(Value::Text("many".into()).to_string(), "\"many\"");
    assert_eq!(Value::Integers(vec![0; 9]).to_string(), "an array of 9 integers");
}

#[test]
fn tensors_are_found_by_name() {
    let (bytes, _) = File::sample().parts();
    let tensors = header(&bytes).unwrap().tensors;
    let start = bytes.len() as u64 - 96;
    let tensor = |kind, shape: &[u64], from, to| TensorInfo {
        kind,
        shape: shape.to_vec(),
        bytes: start + from..start + to,
    };
    assert_eq!(tensors["matrix"], tensor(2, &[2, 32], 0, 36));
    assert_eq!(tensors["vector"], tensor(0, &[3], 64, 76));
    assert_eq!(tensors["other"], tensor(14, &[7], 96, 96));
    assert_eq!(tensors.len(), 3);
}

#[test]
fn the_alignment_moves_the_data() {
    let mut file = File::sample();
    file.put("general.alignment", 4, &4096u32.to_le_bytes());
    file.tensors.truncate(1);
    file.data = 8192;
    let tensors = header(&file.parts().0).unwrap().tensors;
    assert_eq!(tensors["matrix"].bytes, 4096..4096 + 36);
}

#[test]
fn every_truncation_says_which_part_is_missing() {
    let (whole, metadata) = File::sample().parts();
    for length in 0..whole.len() {
        let cut = &whole[..length];
        for error in [header(cut).map(drop), metadata_of(cut).map(drop)] {
            match error {
                Err(ReadError::Truncated { needed, present, .. }) => {
                    assert!(needed > present && present == length as u64, "cut at {length}");
                }
                // What is behind the metadata is not looked at, and of the data only what tensors have.
                Ok(()) if length >= metadata => {}
                other => panic!("cut at {length}: {other:?}"),
            }
        }
    }
    assert!(header(&whole[..whole.len() - 1]).is_err());
    assert!(metadata_of(&whole[..metadata]).is_ok());
}

/// A file that shrinks while it is read.
#[test]
fn less_than_was_said_is_truncated() {
    let (whole, metadata) = File::sample().parts();
    for length in 0..metadata {
        for said in [whole.len() as u64, u64::MAX] {
            let read = read_header(&whole[..length], said, KEPT_MAX, layout);
            let truncated =
                |needed: u64, present: u64| needed > present && present <= length as u64 && needed > length as u64;
            assert!(
                matches!(read, Err(ReadError::Truncated { needed, present, .. }) if truncated(needed, present)),
                "cut at {length}"
            );
        }
    }
}

#[test]
fn other_files_are_refused() {
    assert!(matches!(header(b"PK\x03\x04 a zip file"), Err(ReadError::NotGguf)));
    assert!(matches!(header(b"GGUF\0\0\0\x03"), Err(ReadError::BigEndian)));
    for version in [0, 1, 4] {
        let read = header(&[b"GGUF", &[version, 0, 0, 0][..]].concat());
        assert!(matches!(read, Err(ReadError::UnsupportedVersion { version: found }) if found == u32::from(version)));
    }
    let mut second = File::sample().parts().0;
    second[4] = 2;
    assert!(header(&second).is_ok());
}

/// Also where the file is said to be endless, so that nothing but the end of the input stops the reader.
#[test]
fn huge_counts_allocate_nothing() {
    let huge = |at: usize, bytes: &[u8]| {
        let mut bytes = bytes.to_vec();
        bytes[at..at + 8].fill(0xFF);
        for said in [bytes.len() as u64, u64::MAX] {
            let read = read_header(&bytes[..], said, u64::MAX, layout);
            assert!(
                matches!(read, Err(ReadError::Truncated { .. } | ReadError::Corrupt { .. })),
                "at {at}: {read:?}"
            );
        }
    };
    let whole = File::sample().parts().0;
    // The counts, a key's length, a value's length.
    for at in [8, 16, 24, 24 + 8 + 20 + 4] {
        huge(at, &whole);
    }
    for kind in 0..=12 {
        let mut file = File::sample();
        file.put("a", 9, &array(kind, 0, &[0; 64]));
        let (bytes, metadata) = file.parts();
        huge(metadata - 64 - 8, &bytes);
    }
    let mut file = File::sample();
    file.put("tokens", 9, &array(8, u64::MAX, &[]));
    let read = header(&file.parts().0);
    assert!(matches!(read, Err(ReadError::Truncated { field: Field::Metadata { key }, .. }) if key == "tokens"));
}

#[test]
fn flaws_of_metadata_are_named() {
    let put = |kind, value: &[u8]| flaw(|file| file.put("a", kind, value));
    let a = |flaw| ("metadata a".to_owned(), flaw);
    assert_eq!(put(77, &[]), a(Flaw::UnknownValueType { kind: 77 }));
    assert_eq!(put(9, &array(13, 0, &[])), a(Flaw::UnknownElementType { kind: 13 }));
    assert_eq!(put(7, &[2]), a(Flaw::NotBool));
    assert_eq!(put(8, &[&1u64.to_le_bytes()[..], &[0xFF]].concat()), a(Flaw::NotUtf8));
    let nested = (0..50).fold(array(0, 0, &[]), |inner, _| array(9, 1, &inner));
    assert_eq!(put(9, &nested), a(Flaw::NestedTooDeeply));
    let (field, found) = flaw(|file| file.put("flag", 7, &[0]));
    assert_eq!((field.as_str(), found), ("metadata flag", Flaw::Twice));
    for alignment in [0u32, 3, 1 << 21] {
        let (field, found) = flaw(|file| file.put(ALIGNMENT_KEY, 4, &alignment.to_le_bytes()));
        let (found_value, max) = (alignment.to_string(), ALIGNMENT_MAX);
        assert_eq!(field, "metadata general.alignment");
        assert_eq!(
            found,
            Flaw::Alignment {
                found: found_value,
                max
            }
        );
    }
}

#[test]
fn flaws_of_tensors_are_named() {
    let matrix = |change: fn(&mut (String, Vec<u64>, u32, u64))| flaw(|file| change(&mut file.tensors[0]));
    let named = |flaw| ("tensor matrix".to_owned(), flaw);
    assert_eq!(matrix(|t| t.1 = vec![]), named(Flaw::Dimensions { found: 0, max: 4 }));
    assert_eq!(
        matrix(|t| t.1 = vec![32; 5]),
        named(Flaw::Dimensions { found: 5, max: 4 })
    );
    assert_eq!(matrix(|t| t.1 = vec![u64::MAX; 4]), named(Flaw::TooManyElements));
    assert_eq!(matrix(|t| (t.1, t.2) = (vec![u64::MAX], 0)), named(Flaw::TooManyBytes));
    assert_eq!(
        matrix(|t| t.1 = vec![33, 2]),
        named(Flaw::PartialBlock { row: 33, block: 32 })
    );
    assert_eq!(
        matrix(|t| t.3 = 7),
        named(Flaw::Unaligned {
            offset: 7,
            alignment: 32
        })
    );
    let (field, found) = flaw(|file| file.tensors[1].0 = "matrix".into());
    assert_eq!((field.as_str(), found), ("tensor matrix", Flaw::Twice));
    let mut file = File::sample();
    file.tensors[0].3 = u64::MAX - 31;
    assert!(matches!(header(&file.parts().0), Err(ReadError::Truncated { .. })));
}

#[test]
fn a_layout_without_elements_divides_by_nothing() {
    let (bytes, _) = File::sample().parts();
    let nothing = Layout {
        block_elements: 0,
        block_bytes: 0,
    };
    assert!(read_header(&bytes[..], bytes.len() as u64, KEPT_MAX, |_| Some(nothing)).is_err());
}

fn entries() -> impl Strategy<Value = Vec<(String, Value)>> {
    let integers = |count| prop::collection::vec(any::<i64>().prop_map(i128::from), count);
    let value = prop_oneof![
        any::<i64>().prop_map(|number| Value::Integer(number.into())),
        (-1e300..1e300).prop_map(Value::Float),
        any::<bool>().prop_map(Value::Bool),
        ".{0,9}".prop_map(Value::Text),
        prop::collection::vec(".{0,3}", 0..6).prop_map(Value::Texts),
        integers(0..6).prop_map(Value::Integers),
    ];
    prop::collection::btree_map(".{0,9}", value, 0..9).prop_map(|map| map.into_iter().collect())
}

fn written(value: &Value) -> (u32, Vec<u8>) {
    let i64s = |numbers: &[i128]| {
        numbers
            .iter()
            .flat_map(|n| (*n as i64).to_le_bytes())
            .collect::<Vec<_>>()
    };
    match value {
        Value::Integer(number) => (11, i64s(&[*number])),
        Value::Float(number) => (12, number.to_le_bytes().to_vec()),
        Value::Bool(flag) => (7, vec![(*flag).into()]),
        Value::Text(value) => (8, text(value)),
        Value::Texts(texts) => {
            let elements: Vec<u8> = texts.iter().flat_map(|entry| text(entry)).collect();
            (9, array(8, texts.len() as u64, &elements))
        }
        Value::Integers(numbers) => (9, array(11, numbers.len() as u64, &i64s(numbers))),
        Value::Skipped => unreachable!("none is made"),
    }
}

proptest! {
    #[test]
    fn what_was_written_is_read(entries in entries()) {
        let metadata = entries.iter().map(|(key, value)| {
            let (kind, bytes) = written(value);
            (key.clone(), kind, bytes)
        });
        let file = File { metadata: metadata.collect(), tensors: Vec::new(), data: 0 };
        let read = metadata_of(&file.parts().0).unwrap();
        for (key, value) in &entries {
            let long = match value {
                Value::Texts(texts) => texts.len() as u64 > KEPT_MAX,
                Value::Integers(numbers) => numbers.len() as u64 > KEPT_MAX,
                _ => false,
            };
            prop_assert_eq!(read.get(key), Some(if long { &Value::Skipped } else { value }));
        }
    }

    #[test]
    fn no_bytes_make_it_panic(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        said in prop_oneof![Just(None), any::<u64>().prop_map(Some)],
        kept in any::<u64>(),
    ) {
        let mut file = File::sample().parts().0;
        for (index, byte) in changes {
            let at = index.index(file.len());
            file[at] = byte;
        }
        let said = said.unwrap_or(file.len() as u64);
        let _ = read_header(&file[..], said, kept, layout);
        let _ = read_metadata(&file[..], said, kept);
    }
}
