//! Vocabularies against goldens that `tests/reference/vocabularies.py` makes with llama.cpp,
//! sentencepiece and Hugging Face tokenizers.

use std::{path::Path, time::Duration};

use candela::{
    cli::assemble::{EngineSpec, assemble},
    clock::Clock,
    engine::{GenerateRequest, StopParams, StreamEvent},
    ledger::Lease,
    ops::KvDtype,
    registry::ModelSource,
    sampling::SamplingParams,
    text::{ChatMessage, Detokenizer, GgufVocab, TextError, Tokenizer},
    types::{ModelId, RequestId},
};
use candle_core::{
    DType, Device, Tensor,
    quantized::{GgmlDType, QTensor, gguf_file},
};
use serde::Deserialize;
use serde_json::{Value, json};

/// Nothing in the goldens has it.
const NONCE: char = '\u{10fffd}';

#[derive(Deserialize)]
struct Golden {
    sentencepiece: SentencePiece,
    documents: Documents,
    byte_level: ByteLevel,
}

#[derive(Deserialize)]
struct SentencePiece {
    vocabulary: Vocabulary,
    variants: Vec<Variant>,
}

#[derive(Clone, Deserialize)]
struct Vocabulary {
    tokens: Vec<String>,
    scores: Vec<f32>,
    types: Vec<i32>,
}

#[derive(Deserialize)]
struct Variant {
    space_prefix: bool,
    texts: Vec<Case>,
    decodes: Vec<(Vec<u32>, Vec<u8>)>,
    with_bos: Vec<u32>,
}

#[derive(Deserialize)]
struct Documents {
    merges: Value,
    cases: Vec<DocumentCase>,
}

#[derive(Deserialize)]
struct DocumentCase {
    name: String,
    document: Value,
    texts: Vec<Case>,
    special: Vec<Case>,
    decodes: Vec<(Vec<u32>, String)>,
}

#[derive(Deserialize)]
struct ByteLevel {
    tokens: Vec<String>,
    types: Vec<i32>,
    merges: Vec<String>,
    texts: Vec<String>,
    pres: std::collections::BTreeMap<String, Pre>,
}

#[derive(Deserialize)]
struct Pre {
    /// None where the reference does not read a text as the model's own tokenizer does.
    ids: Vec<Option<Vec<u32>>>,
    with_bos: Vec<u32>,
}

/// A text, its ids, and the text of the ids where it is another.
#[derive(Deserialize)]
#[serde(untagged)]
enum Case {
    Same(String, Vec<u32>),
    Other(String, Vec<u32>, String),
}

impl Case {
    fn parts(&self) -> (&str, &[u32], &str) {
        match self {
            Self::Same(text, ids) => (text, ids, text),
            Self::Other(text, ids, decoded) => (text, ids, decoded),
        }
    }
}

fn golden() -> Golden {
    serde_json::from_str(include_str!("reference/vocabularies.json")).expect("the golden")
}

fn vocab(from: &Vocabulary) -> GgufVocab {
    GgufVocab {
        model: "llama".into(),
        tokens: from.tokens.clone(),
        scores: from.scores.clone(),
        token_types: from.types.clone(),
        bos: Some(1),
        ..GgufVocab::default()
    }
}

/// Text of ids at once must be `text`, and so must its pieces, wherever a prompt ends.
fn check_decoding(what: &str, tokenizer: &Tokenizer, ids: &[u32], text: &str) {
    assert_eq!(tokenizer.decode(ids), text, "{what}: {ids:?} at once");
    for split in 0..=ids.len() {
        let (prompt, output) = ids.split_at(split);
        let mut first = Detokenizer::new(tokenizer);
        let mut pieces: String = prompt.iter().map(|id| first.push(*id)).collect();
        let mut second = Detokenizer::after(tokenizer, prompt);
        // A character that a prompt ends within is in neither text.
        if !first.finish().is_empty() {
            continue;
        }
        pieces.extend(output.iter().map(|id| second.push(*id)));
        pieces += &second.finish();
        assert_eq!(pieces, text, "{what}: {ids:?} after {split}");
    }
}

fn check(what: &str, tokenizer: &Tokenizer, case: &Case, special: bool) {
    let (text, expected, decoded) = case.parts();
    let ids = match special {
        true => tokenizer.encode_with_special(text, NONCE),
        false => tokenizer.encode(text, false),
    };
    assert_eq!(ids.expect("encodes"), expected, "{what}: {text:?}");
    check_decoding(what, tokenizer, expected, decoded);
}

#[test]
fn sentencepiece_in_gguf_agrees_with_llama_cpp() {
    let golden = golden().sentencepiece;
    for variant in golden.variants {
        let vocab = GgufVocab {
            // What the file leaves out is as with a prefix.
            add_space_prefix: (!variant.space_prefix).then_some(false),
            ..vocab(&golden.vocabulary)
        };
        let tokenizer = Tokenizer::from_gguf(&vocab).expect("a vocabulary");
        let what = format!("space prefix {}", variant.space_prefix);
        for case in &variant.texts {
            check(&what, &tokenizer, case, false);
        }
        for (ids, bytes) in &variant.decodes {
            check_decoding(&what, &tokenizer, ids, &String::from_utf8_lossy(bytes));
        }
        assert_eq!(tokenizer.encode("the river", true).expect("encodes"), variant.with_bos);
        let without = GgufVocab { add_bos: Some(false), ..vocab };
        let tokenizer = Tokenizer::from_gguf(&without).expect("a vocabulary");
        assert_eq!(tokenizer.encode("the river", true).expect("encodes"), variant.with_bos[1..]);
    }
}

#[test]
fn tokens_have_their_bytes() {
    let vocabulary = golden().sentencepiece.vocabulary;
    let tokenizer = Tokenizer::from_gguf(&vocab(&vocabulary)).expect("a vocabulary");
    let id = |token: &str| vocabulary.tokens.iter().position(|t| t == token).expect(token) as u32;
    for (token, bytes, is_special) in [
        ("<0x0A>", &b"\n"[..], false),
        ("<0x00>", &[0], false),
        ("<0xFF>", &[255], false),
        ("▁", b" ", false),
        ("▁river", b" river", false),
        ("<<SYS>>", b"<<SYS>>", false),
        ("<s>", b"", true),
        ("<unk>", b"", true),
        ("[INST]", b"", true),
    ] {
        assert_eq!(tokenizer.token_bytes(id(token)), bytes, "{token}");
        assert_eq!(tokenizer.is_special(id(token)), is_special, "{token}");
        assert_eq!(tokenizer.special_id(token), is_special.then(|| id(token)), "{token}");
    }
    assert_eq!(tokenizer.token_text(id("[INST]")), "[INST]");
    assert_eq!(tokenizer.token_text(id("▁river")), " river");
    assert_eq!(tokenizer.token_bytes(u32::MAX), b"");
    assert_eq!(tokenizer.vocab_size(), vocabulary.tokens.len());
}

#[test]
fn documents_agree_with_hugging_face() {
    let golden = golden();
    let tokens = golden.sentencepiece.vocabulary.tokens.iter().enumerate();
    let ids: serde_json::Map<_, _> = tokens.map(|(id, token)| (token.clone(), id.into())).collect();
    assert!(golden.documents.cases.len() > 5);
    for mut case in golden.documents.cases {
        case.document["model"]["vocab"] = ids.clone().into();
        case.document["model"]["merges"] = golden.documents.merges.clone();
        let json = case.document.to_string();
        let tokenizer = Tokenizer::from_json(json.as_bytes(), None).expect("a document");
        for (cases, special) in [(&case.texts, false), (&case.special, true)] {
            for one in cases {
                check(&case.name, &tokenizer, one, special);
            }
        }
        for (ids, text) in &case.decodes {
            check_decoding(&case.name, &tokenizer, ids, text);
        }
    }
}

#[test]
fn byte_level_in_gguf_agrees_with_llama_cpp() {
    let golden = golden().byte_level;
    for (pre, expected) in &golden.pres {
        let vocab = GgufVocab {
            model: "gpt2".into(),
            pre: pre.clone(),
            tokens: golden.tokens.clone(),
            merges: golden.merges.clone(),
            token_types: golden.types.clone(),
            bos: Some(golden.tokens.len() as u32 - 1),
            ..GgufVocab::default()
        };
        let tokenizer = Tokenizer::from_gguf(&vocab).expect("a vocabulary");
        assert_eq!(expected.ids.len(), golden.texts.len());
        for (text, ids) in golden.texts.iter().zip(&expected.ids) {
            if let Some(ids) = ids {
                check(pre, &tokenizer, &Case::Same(text.clone(), ids.clone()), false);
            }
        }
        assert_eq!(tokenizer.encode("a", true).expect("encodes"), expected.with_bos, "{pre}");
    }
}

/// A model of one small layer with the vocabulary, as a converter would write it.
fn write_model(path: &Path, vocabulary: &Vocabulary) {
    use gguf_file::Value::{Array, Bool, F32, I32, String, U32};
    let (hidden, inner, vocab) = (64, 96, vocabulary.tokens.len());
    let tensor = |n: usize, k: usize| {
        let values = Tensor::randn(0f32, 0.1, (n, k), &Device::Cpu).expect("a tensor");
        QTensor::quantize(&values, GgmlDType::F32).expect("quantises")
    };
    let norm = Tensor::ones(hidden, DType::F32, &Device::Cpu).expect("a tensor");
    let norm = || QTensor::quantize(&norm, GgmlDType::F32).expect("quantises");
    let tensors = [
        ("token_embd.weight", tensor(vocab, hidden)),
        ("output_norm.weight", norm()),
        ("blk.0.attn_norm.weight", norm()),
        ("blk.0.attn_q.weight", tensor(hidden, hidden)),
        ("blk.0.attn_k.weight", tensor(hidden, hidden)),
        ("blk.0.attn_v.weight", tensor(hidden, hidden)),
        ("blk.0.attn_output.weight", tensor(hidden, hidden)),
        ("blk.0.ffn_norm.weight", norm()),
        ("blk.0.ffn_gate.weight", tensor(inner, hidden)),
        ("blk.0.ffn_up.weight", tensor(inner, hidden)),
        ("blk.0.ffn_down.weight", tensor(hidden, inner)),
    ];
    let template =
        "{{ bos_token }}{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}";
    let metadata = [
        ("general.architecture", String("llama".into())),
        ("llama.embedding_length", U32(hidden as u32)),
        ("llama.feed_forward_length", U32(inner as u32)),
        ("llama.block_count", U32(1)),
        ("llama.context_length", U32(64)),
        ("llama.attention.head_count", U32(4)),
        ("tokenizer.ggml.model", String("llama".into())),
        ("tokenizer.ggml.tokens", Array(vocabulary.tokens.iter().cloned().map(String).collect())),
        ("tokenizer.ggml.scores", Array(vocabulary.scores.iter().copied().map(F32).collect())),
        ("tokenizer.ggml.token_type", Array(vocabulary.types.iter().copied().map(I32).collect())),
        ("tokenizer.ggml.bos_token_id", U32(1)),
        ("tokenizer.ggml.eos_token_id", U32(2)),
        ("tokenizer.ggml.add_bos_token", Bool(true)),
        ("tokenizer.chat_template", String(template.into())),
    ];
    let mut file = std::fs::File::create(path).expect("creates");
    let metadata: Vec<_> = metadata.iter().map(|(key, value)| (*key, value)).collect();
    let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (*name, tensor)).collect();
    gguf_file::write(&mut file, &metadata, &tensors).expect("writes");
}

/// From a file to the text of a request: what follows a prompt is what the whole text has more.
#[tokio::test]
async fn a_sentencepiece_model_is_served() {
    let golden = golden().sentencepiece;
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("model.gguf");
    write_model(&path, &golden.vocabulary);
    let spec = EngineSpec {
        threads: 1,
        context_tokens_max: None,
        kv_cache_bytes: 1 << 20,
        kv_dtype: KvDtype::F32,
        step_tokens_max: 64,
        running_seqs_max: 4,
        waiting_requests_max: 4,
        pipeline_depth: 1,
        stream_buffer_events_max: 64,
        client_stall_max: Duration::from_secs(60),
        calibration: Duration::ZERO,
        metered: true,
        gpu: None,
    };
    let model = assemble(&ModelId::new("m"), &ModelSource::Gguf { path }, &spec, Clock::system());
    let model = model.expect("assembles");
    assert_eq!(
        model.tokenizer.encode("the river", true).expect("encodes"),
        golden.variants[0].with_bos
    );
    let template = model.template.as_ref().expect("a template");
    let message = ChatMessage { role: "user".into(), content: "</s>".into(), name: None };
    let chat = template.encode(&model.tokenizer, &[message], true).expect("encodes");
    assert_eq!((&chat[..2], chat.last()), (&[1, 3][..], Some(&4)), "<s>[INST] .. [/INST]");
    assert!(!chat.contains(&2), "a typed end token stays text: {chat:?}");
    let id =
        |token: &str| golden.vocabulary.tokens.iter().position(|t| t == token).expect(token) as u32;
    let (river, the) = (id("▁river"), id("he"));
    for (prompt, expected) in [
        (vec![1], "river river river"),
        (vec![1, the], " river river river"),
        (vec![1, 3, the, 4], " river river river"),
        (vec![id("▁")], " river river river"),
    ] {
        let logit_bias = [(river, 1e6)].into();
        let request = GenerateRequest {
            id: RequestId::new("r"),
            prompt: prompt.clone().into(),
            choices: 1,
            sampling: SamplingParams { temperature: 0.0, logit_bias, ..Default::default() },
            stop: StopParams { max_tokens: 3, ..Default::default() },
            prompt_logprobs: None,
        };
        let mut stream =
            model.engine.handle.submit(request, Lease::unlimited()).expect("submitted");
        let mut out = std::string::String::new();
        while let Some(event) = stream.next().await {
            match event {
                StreamEvent::Delta { text, .. } => out += &text,
                StreamEvent::Error(error) => panic!("{error}"),
                _ => {}
            }
        }
        assert_eq!(out, expected, "{prompt:?}");
        let whole = [&prompt[..], &[river; 3]].concat();
        let whole = model.tokenizer.decode(&whole);
        assert_eq!(model.tokenizer.decode(&prompt) + &out, whole, "{prompt:?}");
    }
}

#[test]
fn what_a_template_puts_before_a_text_is_put_there() {
    let document = |post_processor: Value| {
        json!({
            "added_tokens": [{"id": 1, "content": "<s>", "special": true, "single_word": false,
                "lstrip": false, "rstrip": false, "normalized": false}],
            "post_processor": post_processor,
            "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "model": {"type": "BPE", "vocab": {"a": 0, "<s>": 1}, "merges": []},
        })
        .to_string()
    };
    let template = json!({"type": "TemplateProcessing", "pair": [],
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}});
    let step = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let sequence = json!({"type": "Sequence", "processors": [step, template]});
    for (post_processor, bos, expected) in [
        (Value::Null, None, &[0][..]),
        (Value::Null, Some(1), &[1, 0]),
        (step.clone(), None, &[0]),
        (template.clone(), None, &[1, 0]),
        (sequence, None, &[1, 0]),
        (template, Some(0), &[0, 0]),
    ] {
        let tokenizer = Tokenizer::from_json(document(post_processor).as_bytes(), bos);
        let tokenizer = tokenizer.expect("a document");
        assert_eq!(tokenizer.encode("a", true).expect("encodes"), expected);
        assert_eq!(tokenizer.encode("a", false).expect("encodes"), [0]);
    }
}

#[test]
fn what_cannot_be_read_is_named() {
    let good = golden().sentencepiece.vocabulary;
    let no_bytes = Vocabulary {
        types: good
            .types
            .iter()
            .map(|kind| if [2, 6].contains(kind) { 1 } else { *kind })
            .collect(),
        ..good.clone()
    };
    let few_scores = Vocabulary { scores: vec![0.0; 3], ..good.clone() };
    let gpt2 = |pre: &str| GgufVocab { model: "gpt2".into(), pre: pre.into(), ..vocab(&good) };
    for (vocab, said) in [
        (GgufVocab { model: "bert".into(), ..vocab(&good) }, "GGUF tokenizer \"bert\""),
        (GgufVocab::default(), "GGUF tokenizer \"\""),
        (gpt2(""), "GGUF pre-tokenizer \"\""),
        (gpt2("llama-spm-9"), "GGUF pre-tokenizer \"llama-spm-9\""),
        (vocab(&no_bytes), "neither all bytes"),
        (vocab(&few_scores), "3 GGUF scores for 520 tokens"),
    ] {
        let error = Tokenizer::from_gguf(&vocab).err().expect(said).to_string();
        assert!(error.contains(said), "{error:?} lacks {said:?}");
    }
    let fuse = json!({"type": "Fuse"});
    let strip = |content: &str, start: u32, stop: u32| json!({"type": "Strip", "content": content, "start": start, "stop": stop});
    for (decoder, said) in [
        (Value::Null, "(none)"),
        (json!({"type": "WordPiece", "prefix": "##", "cleanup": true}), "WordPiece"),
        (json!({"type": "Sequence", "decoders": [strip(" ", 1, 0), fuse]}), "Strip"),
        (json!({"type": "Sequence", "decoders": [fuse, strip(" ", 0, 1)]}), "Strip"),
        (json!({"type": "Sequence", "decoders": [fuse, strip("x", 1, 0)]}), "Strip"),
        (
            json!({"type": "Replace", "pattern": {"Regex": "a+"}, "content": " "}),
            "replaces a pattern",
        ),
    ] {
        let document =
            json!({"decoder": decoder, "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}});
        match Tokenizer::from_json(document.to_string().as_bytes(), None).err() {
            Some(TextError::Unsupported(what)) => assert!(what.contains(said), "{what}"),
            other => panic!("{said}: {other:?}"),
        }
    }
}
