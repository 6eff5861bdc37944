//! Properties of the parts that meet hostile or unlucky input: model file headers, the block
//! allocator, the incremental detokenizer and stop strings. `PROPTEST_CASES` makes it longer.

mod common;

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    collections::BTreeMap,
    sync::OnceLock,
};

use candela::{
    cache::BlockPool,
    model::{gguf::Gguf, safetensors},
    text::{Detokenizer, StopMatcher, Tokenizer},
    types::BlockId,
};
use proptest::prelude::*;
use serde_json::json;

/// The system's allocator, which notes the largest block that a thread asks for.
struct Watched;

thread_local! {
    static LARGEST: Cell<usize> = const { Cell::new(0) };
}

fn note(size: usize) {
    // A thread that is ending has no such variable any more.
    let _ = LARGEST.try_with(|largest| largest.set(largest.get().max(size)));
}

// SAFETY: everything is passed on to the system's allocator.
unsafe impl GlobalAlloc for Watched {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note(layout.size());
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, data: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(data, layout) }
    }

    unsafe fn realloc(&self, data: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        note(size);
        // SAFETY: as the caller promises.
        unsafe { System.realloc(data, layout, size) }
    }
}

#[global_allocator]
static WATCHED: Watched = Watched;

/// Most bytes that a header may make its reader allocate at once, for each byte of the file.
const BYTES_PER_BYTE_MAX: usize = 64;

/// The largest block allocated by `work`.
fn largest<T>(work: impl FnOnce() -> T) -> (T, usize) {
    LARGEST.set(0);
    let result = work();
    (result, LARGEST.get())
}

/// What happens to a file on its way.
#[derive(Clone, Debug)]
enum Damage {
    Cut(prop::sample::Index),
    Byte(prop::sample::Index, u8),
    /// A count, length or offset.
    Word(prop::sample::Index, u64),
}

impl Damage {
    fn apply(&self, file: &mut Vec<u8>) {
        match self {
            Self::Cut(at) if !file.is_empty() => file.truncate(at.index(file.len())),
            Self::Byte(at, byte) if !file.is_empty() => {
                let at = at.index(file.len());
                file[at] = *byte;
            }
            Self::Word(at, word) if file.len() >= 8 => {
                let at = at.index(file.len() - 7);
                file[at..at + 8].copy_from_slice(&word.to_le_bytes());
            }
            _ => {}
        }
    }
}

fn damage() -> impl Strategy<Value = Vec<Damage>> {
    let index = any::<prop::sample::Index>;
    let word = prop_oneof![0u64..300, Just(u64::MAX), Just(1 << 63), Just(1 << 32), any::<u64>()];
    let one = prop_oneof![
        1 => index().prop_map(Damage::Cut),
        3 => (index(), any::<u8>()).prop_map(|(at, byte)| Damage::Byte(at, byte)),
        3 => (index(), word).prop_map(|(at, word)| Damage::Word(at, word)),
    ];
    prop::collection::vec(one, 0..4)
}

/// A small GGUF file with values of every kind that matters, and two tensors.
fn gguf_file() -> Vec<u8> {
    fn text(out: &mut Vec<u8>, text: &str) {
        out.extend((text.len() as u64).to_le_bytes());
        out.extend(text.as_bytes());
    }
    let mut out = b"GGUF".to_vec();
    out.extend(3u32.to_le_bytes());
    out.extend(2u64.to_le_bytes());
    out.extend(6u64.to_le_bytes());
    text(&mut out, "general.architecture");
    out.extend(8u32.to_le_bytes());
    text(&mut out, "llama");
    text(&mut out, "llama.block_count");
    out.extend(4u32.to_le_bytes());
    out.extend(2u32.to_le_bytes());
    text(&mut out, "tokens");
    out.extend([9u32, 8].map(u32::to_le_bytes).concat());
    out.extend(3u64.to_le_bytes());
    for token in ["a", "bc", "def"] {
        text(&mut out, token);
    }
    text(&mut out, "types");
    out.extend([9u32, 5].map(u32::to_le_bytes).concat());
    out.extend(3u64.to_le_bytes());
    out.extend([1i32, 3, 1].map(i32::to_le_bytes).concat());
    text(&mut out, "scores");
    out.extend([9u32, 6].map(u32::to_le_bytes).concat());
    out.extend(2u64.to_le_bytes());
    out.extend([-1.5f32, 0.0].map(f32::to_le_bytes).concat());
    text(&mut out, "lists");
    out.extend([9u32, 9].map(u32::to_le_bytes).concat());
    out.extend(2u64.to_le_bytes());
    out.extend(7u32.to_le_bytes());
    out.extend(2u64.to_le_bytes());
    out.extend([0, 1]);
    out.extend(8u32.to_le_bytes());
    out.extend(0u64.to_le_bytes());
    for (name, offset) in [("x.weight", 0u64), ("y.weight", 64)] {
        text(&mut out, name);
        out.extend(2u32.to_le_bytes());
        out.extend([4u64, 4].map(u64::to_le_bytes).concat());
        out.extend(0u32.to_le_bytes());
        out.extend(offset.to_le_bytes());
    }
    out.resize(out.len().next_multiple_of(32) + 128, 7);
    out
}

fn safetensors_file() -> Vec<u8> {
    let header = br#"{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,4],"data_offsets":[0,32]},"b":{"dtype":"BF16","shape":[8],"data_offsets":[32,48]}}"#;
    let mut out = (header.len() as u64).to_le_bytes().to_vec();
    out.extend(header);
    out.resize(out.len() + 48, 7);
    out
}

/// Ranges lie in the file and do not overlap.
fn sound(mut ranges: Vec<std::ops::Range<usize>>, len: usize) -> bool {
    ranges.sort_by_key(|range| (range.start, range.end));
    ranges.iter().all(|range| range.start <= range.end && range.end <= len)
        && ranges.windows(2).all(|pair| pair[0].end <= pair[1].start)
}

#[test]
fn the_undamaged_files_are_read() {
    let gguf = Gguf::parse(&gguf_file()).expect("reads");
    assert_eq!(gguf.tensors.len(), 2);
    assert_eq!(gguf.get_u32("llama.block_count"), Some(2));
    assert_eq!(gguf.get_str_array("tokens"), Some(vec!["a", "bc", "def"]));
    assert_eq!(gguf.get_i32_array("types"), Some(vec![1, 3, 1]));
    assert_eq!(gguf.get_f32_array("scores"), Some(vec![-1.5, 0.0]));
    for key in ["types", "lists", "llama.block_count", "absent"] {
        assert_eq!((gguf.get_str_array(key), gguf.get_f32_array(key)), (None, None), "{key}");
    }
    assert_eq!(safetensors::parse(&safetensors_file()).expect("reads").len(), 2);
}

/// Vocabularies have hundreds of thousands of values: an array takes what the file has of it.
#[test]
fn long_arrays_stay_compact() {
    const VALUES: u64 = 200_000;
    for (kind, value) in [(0u32, &b"\x01"[..]), (6, b"\0\0\x80\x3f"), (8, b"\x01\0\0\0\0\0\0\0a")] {
        let mut file = [&b"GGUF"[..], &3u32.to_le_bytes(), &0u64.to_le_bytes()].concat();
        file.extend([&1u64.to_le_bytes()[..], &1u64.to_le_bytes(), b"k"].concat());
        file.extend([9, kind].map(u32::to_le_bytes).concat());
        file.extend(VALUES.to_le_bytes());
        file.extend(value.repeat(VALUES as usize));
        let (parsed, largest) = largest(|| Gguf::parse(&file));
        assert!(parsed.expect("reads").metadata("k").is_some());
        assert!(largest <= file.len() + 64, "type {kind}: {largest} bytes of {}", file.len());
    }
}

fn config() -> ProptestConfig {
    let config = ProptestConfig::default();
    ProptestConfig { cases: config.cases.max(4096), ..config }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn a_damaged_gguf_header_is_an_error_or_sound(damage in damage()) {
        let mut file = gguf_file();
        damage.iter().for_each(|one| one.apply(&mut file));
        let (parsed, largest) = largest(|| Gguf::parse(&file));
        prop_assert!(largest <= file.len() * BYTES_PER_BYTE_MAX + 4096, "{largest} bytes at once");
        if let Ok(gguf) = parsed {
            prop_assert!(sound(gguf.tensors.values().map(|t| t.bytes.clone()).collect(), file.len()));
        }
    }

    #[test]
    fn a_damaged_safetensors_header_is_an_error_or_sound(damage in damage()) {
        let mut file = safetensors_file();
        damage.iter().for_each(|one| one.apply(&mut file));
        let (parsed, largest) = largest(|| safetensors::parse(&file));
        prop_assert!(largest <= file.len() * BYTES_PER_BYTE_MAX + 4096, "{largest} bytes at once");
        if let Ok(tensors) = parsed {
            prop_assert!(sound(tensors.values().map(|t| t.bytes.clone()).collect(), file.len()));
        }
    }

    /// Against a map of owners.
    #[test]
    fn the_block_allocator_keeps_count(steps in prop::collection::vec((0u8..5, any::<prop::sample::Index>()), 0..200)) {
        const BLOCKS: usize = 7;
        let mut pool = BlockPool::new(BLOCKS);
        let mut model: BTreeMap<u32, u32> = BTreeMap::new();
        for (step, pick) in steps {
            let held: Vec<u32> = model.keys().copied().collect();
            match step {
                0 => match pool.alloc() {
                    Some(block) => prop_assert!(model.insert(block.0, 1).is_none(), "given twice"),
                    None => prop_assert_eq!(model.len(), BLOCKS),
                },
                1 => {
                    let count = pick.index(BLOCKS + 2);
                    match pool.alloc_many(count) {
                        Some(blocks) => {
                            prop_assert_eq!(blocks.len(), count);
                            for block in blocks {
                                prop_assert!(model.insert(block.0, 1).is_none(), "given twice");
                            }
                        }
                        None => prop_assert!(model.len() + count > BLOCKS),
                    }
                }
                _ if held.is_empty() => {}
                2 => {
                    let block = held[pick.index(held.len())];
                    pool.retain(BlockId(block));
                    *model.entry(block).or_default() += 1;
                }
                _ => {
                    let block = held[pick.index(held.len())];
                    pool.release(BlockId(block));
                    let owners = model.entry(block).or_default();
                    *owners -= 1;
                    if *owners == 0 {
                        model.remove(&block);
                    }
                }
            }
            prop_assert_eq!((pool.used(), pool.available()), (model.len(), BLOCKS - model.len()));
            for (block, owners) in &model {
                prop_assert_eq!(pool.is_shared(BlockId(*block)), *owners > 1);
            }
        }
    }

    /// However the text is split, what comes out is the text before the leftmost stop string.
    #[test]
    fn stop_strings_do_not_depend_on_the_pieces(
        stops in prop::collection::vec("[abé]{1,4}", 0..4),
        pieces in prop::collection::vec("[abcé]{0,5}", 0..12),
    ) {
        let whole = pieces.concat();
        let cut = stops.iter().filter_map(|stop| whole.find(stop.as_str())).min();
        let mut matcher = StopMatcher::new(&stops);
        let (mut text, mut matched) = (String::new(), false);
        for piece in &pieces {
            let step = matcher.push(piece);
            text.push_str(&step.emit);
            matched |= step.matched;
        }
        let step = if matched { Default::default() } else { matcher.finish() };
        text.push_str(&step.emit);
        prop_assert_eq!(matched || step.matched, cut.is_some());
        prop_assert_eq!(text, &whole[..cut.unwrap_or(whole.len())]);
    }

    /// Against a search at every place. Literals overlap and begin one another, one is a character.
    #[test]
    fn special_tokens_are_found_where_they_stand(text in "[<a>bé]{0,24}") {
        let tokenizer = special_tokenizer();
        let (mut expected, mut plain, mut rest) = (Vec::new(), String::new(), text.as_str());
        let flush = |plain: &mut String, ids: &mut Vec<u32>| {
            ids.extend(tokenizer.encode(&std::mem::take(plain), false).expect("encodes"));
        };
        while let Some(first) = rest.chars().next() {
            let here = SPECIAL.iter().filter(|literal| rest.starts_with(**literal));
            match here.max_by_key(|literal| literal.len()) {
                Some(literal) => {
                    flush(&mut plain, &mut expected);
                    expected.extend(tokenizer.special_id(literal));
                    rest = &rest[literal.len()..];
                }
                None => {
                    plain.push(first);
                    rest = &rest[first.len_utf8()..];
                }
            }
        }
        flush(&mut plain, &mut expected);
        prop_assert_eq!(tokenizer.encode_with_special(&text, NONCE).expect("encodes"), expected);

        let defused = tokenizer.defuse(&text, NONCE);
        let around = format!("</end>{defused}</end>");
        let ids = tokenizer.encode_with_special(&around, NONCE).expect("encodes");
        let end = tokenizer.special_id("</end>").expect("a literal");
        let Some((first, [inner @ .., last])) = ids.split_first() else { panic!("{ids:?}") };
        prop_assert_eq!((*first, *last), (end, end));
        prop_assert_eq!(inner, tokenizer.encode(&text, false).expect("encodes"), "typed: {:?}", defused);
        prop_assert_eq!(defused.replace(NONCE, ""), text);
    }

    /// Tokens one at a time give the text of all at once, and never half a character.
    #[test]
    fn the_detokenizer_agrees_with_decoding_at_once(ids in prop::collection::vec(0u32..400, 0..40), text in "\\PC{0,20}") {
        let tokenizer = tokenizer();
        for ids in [ids, tokenizer.encode(&text, false).expect("encodes")] {
            let mut detokenizer = Detokenizer::new(tokenizer);
            let mut pieces: Vec<String> = ids.iter().map(|id| detokenizer.push(*id)).collect();
            pieces.push(detokenizer.finish());
            prop_assert_eq!(pieces.concat(), tokenizer.decode(&ids));
        }
        let mut detokenizer = Detokenizer::new(tokenizer);
        let ids = tokenizer.encode(&text, false).expect("encodes");
        let pieces: String = ids.iter().map(|id| detokenizer.push(*id)).collect();
        prop_assert_eq!(pieces, text, "nothing is left over, and nothing is a replacement");
    }
}

const SPECIAL: [&str; 7] = ["<a>", "<a><b>", "a>b", "aa", "é", ">>", "</end>"];
const NONCE: char = '\u{10fffd}';

/// Single characters, and special tokens.
fn special_tokenizer() -> &'static Tokenizer {
    static TOKENIZER: OnceLock<Tokenizer> = OnceLock::new();
    TOKENIZER.get_or_init(|| {
        let mut vocab = serde_json::Map::new();
        for token in ["<", "a", ">", "b", "Ã", "©"].into_iter().chain(SPECIAL) {
            vocab.insert(token.into(), vocab.len().into());
        }
        let added = SPECIAL.map(|literal| {
            json!({"id": vocab[literal], "content": literal, "special": true, "single_word": false,
                "lstrip": false, "rstrip": false, "normalized": false})
        });
        let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
        let document = json!({"added_tokens": added, "pre_tokenizer": bytes, "decoder": bytes,
            "model": {"type": "BPE", "vocab": vocab, "merges": []}});
        Tokenizer::from_json(document.to_string().as_bytes(), None).expect("a vocabulary")
    })
}

/// A search of the rest of the text for every literal at every hit would take minutes.
#[test]
fn long_chats_are_split_in_one_pass() {
    const HITS: usize = 500_000;
    let (tokenizer, text) = (special_tokenizer(), "<a>".repeat(HITS));
    let start = std::time::Instant::now();
    assert_eq!(tokenizer.encode_with_special(&text, NONCE).expect("encodes").len(), HITS);
    assert_eq!(tokenizer.defuse(&text, NONCE).matches(NONCE).count(), HITS);
    assert!(start.elapsed() < std::time::Duration::from_secs(10), "{:?}", start.elapsed());
}

/// The vocabulary of the default model; its first ids are control tokens and single bytes.
fn tokenizer() -> &'static Tokenizer {
    static TOKENIZER: OnceLock<Tokenizer> = OnceLock::new();
    TOKENIZER.get_or_init(|| {
        use candela::{model::GgufFile, text::GgufVocab};
        let file = GgufFile::open(&common::default_model()).expect("opens");
        let strings = |key| -> Vec<String> {
            let list = file.header.get_str_array(key).expect("there");
            list.into_iter().map(str::to_owned).collect()
        };
        Tokenizer::from_gguf(&GgufVocab {
            model: "gpt2".into(),
            pre: "smollm".into(),
            tokens: strings("tokenizer.ggml.tokens"),
            merges: strings("tokenizer.ggml.merges"),
            token_types: file.header.get_i32_array("tokenizer.ggml.token_type").expect("there"),
            ..GgufVocab::default()
        })
        .expect("a vocabulary")
    })
}
