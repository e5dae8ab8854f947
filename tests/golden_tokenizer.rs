//! Tokenizer, chat template and loss masks against vectors from other implementations (tests/golden/tokenizer/meta.json
//! says which), and against the published Qwen2.5 tokenizer where its folder is at hand.

use std::path::{Path, PathBuf};

use perilune::data::chat_template::{ChatTemplate, Rendering};
use perilune::data::tokenizer::{Specials, StreamDecoder, Tokenizer};
use serde_json::Value;

fn golden(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tokenizer").join(file)
}

fn read(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

/// The folder of the published tokenizer: in PERILUNE_DATA, else beside the project. A test without it says so and passes.
fn published() -> Option<PathBuf> {
    let beside = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/data");
    let folder = std::env::var_os("PERILUNE_DATA").map_or_else(beside, PathBuf::from).join("qwen2.5-tokenizer");
    if folder.join("tokenizer.json").exists() {
        return Some(folder);
    }
    eprintln!("skipped: no Qwen2.5 tokenizer at {}; set PERILUNE_DATA to the folder that holds it", folder.display());
    None
}

#[test]
fn encode_and_decode_match_the_vectors() {
    for tokenizer in [
        Tokenizer::from_folder(&golden("")).unwrap(),
        Tokenizer::from_vocab_and_merges(&golden("vocab.json"), &golden("merges.txt"), Some(&read(&golden("tokenizer_config.json"))))
            .unwrap(),
    ] {
        assert_eq!(tokenizer.vocab_size(), 600);
        assert_eq!((tokenizer.end_of_text(), tokenizer.im_start(), tokenizer.im_end()), (Some(578), Some(579), Some(580)));
        let vectors = read(&golden("vectors.json"));
        for case in vectors["encode"].as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            assert_eq!(tokenizer.encode(text, Specials::Recognise), ids(&case["ids"]), "{text:?}");
            assert_eq!(tokenizer.decode(&ids(&case["ids"]), false).unwrap(), case["decoded"].as_str().unwrap());
            assert_eq!(tokenizer.decode(&ids(&case["ids"]), true).unwrap(), case["decoded_skip_special"].as_str().unwrap());
            let plain = tokenizer.encode(text, Specials::Plain);
            assert!(plain.iter().all(|id| *id < 578), "{text:?} became a control token");
            if plain.iter().eq(ids(&case["ids"]).iter().filter(|id| **id < 578)) {
                assert_eq!(tokenizer.decode(&plain, false).unwrap(), case["decoded"].as_str().unwrap());
            }
        }
        for case in vectors["single_token_decode"].as_array().unwrap() {
            assert_eq!(tokenizer.id_to_token(case[0].as_u64().unwrap() as u32).as_deref(), case[1].as_str());
        }
        for case in vectors["stream"].as_array().unwrap() {
            let mut decoder = StreamDecoder::new(false);
            let (mut shown, case_ids) = (String::new(), ids(&case["ids"]));
            for (index, id) in case_ids.iter().enumerate() {
                let prefix = case["prefix_decodes"][index].as_str().unwrap();
                assert_eq!(tokenizer.decode(&case_ids[..=index], false).unwrap(), prefix);
                shown += &decoder.push(&tokenizer, *id).unwrap();
                // What is shown is the prefix without its unfinished last character.
                assert_eq!(shown, prefix.trim_end_matches('\u{FFFD}'));
            }
            assert_eq!(shown + &decoder.finish(), case["text"].as_str().unwrap());
        }
    }
}

#[test]
fn a_saved_tokenizer_keeps_its_ids() {
    let tokenizer = Tokenizer::from_folder(&golden("")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    tokenizer.save(folder.path(), None).unwrap();
    assert_eq!(std::fs::read(folder.path().join("tokenizer.json")).unwrap(), std::fs::read(golden("tokenizer.json")).unwrap());
    let back = Tokenizer::from_folder(folder.path()).unwrap();
    assert_eq!(back.fingerprint(), tokenizer.fingerprint());
    assert_eq!((back.eos(), back.pad()), (Some(580), Some(578)));
}

#[test]
fn the_published_tokenizer_gives_the_published_ids() {
    let Some(folder) = published() else { return };
    let tokenizer = Tokenizer::from_folder(&folder).unwrap();
    assert_eq!(tokenizer.vocab_size(), 151_665);
    for case in read(&folder.join("vectors.json")).as_array().unwrap() {
        assert_eq!(tokenizer.encode(case["text"].as_str().unwrap(), Specials::Recognise), ids(&case["ids"]), "{}", case["text"]);
    }
    let cases: [(&str, &[u32]); 12] = [
        ("Hello world", &[9707, 1879]),
        (" Hello world", &[21927, 1879]),
        ("I'M don't", &[40, 27603, 1513, 944]),
        ("1234567", &[16, 17, 18, 19, 20, 21, 22]),
        ("3.14159", &[18, 13, 16, 19, 16, 20, 24]),
        ("  two  spaces\n\n\nnext", &[220, 1378, 220, 12621, 1406, 3600]),
        ("\tfoo\r\nbar", &[197, 7975, 319, 2257]),
        ("你好，世界！", &[108386, 3837, 99489, 6313]),
        ("🤗", &[144834]),
        ("\u{3D2}\u{301}", &[149493]),
        ("a\u{301}e", &[1953, 68]),
        (
            "<tool_call>\n{\"name\": \"f\", \"arguments\": {}}\n</tool_call>",
            &[151657, 198, 4913, 606, 788, 330, 69, 497, 330, 16370, 788, 4687, 532, 151658],
        ),
    ];
    for (text, expected) in cases {
        assert_eq!(tokenizer.encode(text, Specials::Recognise), expected, "{text:?}");
    }
    assert!(tokenizer.decode(&[151_665], false).is_err());
}

#[test]
fn long_texts_have_the_ids_that_an_unsplit_encoding_gives() {
    let Some(folder) = published() else { return };
    let tokenizer = Tokenizer::from_folder(&folder).unwrap();
    let theirs = tokenizers::Tokenizer::from_file(folder.join("tokenizer.json")).unwrap();
    let beside = ["tinyshakespeare/input.txt", "chinese/tang-song-600.txt", "mbpp/train.jsonl", "llamafactory-demo/wiki_demo.txt"];
    let read = |file| std::fs::read_to_string(folder.join("..").join(file)).unwrap_or_default();
    let mut text: String = beside.map(read).concat();
    // Awkward places for a cut: blank lines, indented lines, carriage returns, marks after a newline, control tokens.
    text += &"x \r\n\r\n  y\n\u{301}z\n\n\n<|im_end|>\n中文\n \n\t!\n?\n".repeat(8_000);
    let ours = tokenizer.encode(&text, Specials::Recognise);
    let theirs = theirs.encode_fast(text.as_str(), false).unwrap();
    assert!(ours == theirs.get_ids(), "{} ids and {}", ours.len(), theirs.len());
}

/// Rendering options of a case in chats.json or chat-vectors.json. Its writer left string arguments as they came.
fn rendering(case: &Value) -> Rendering {
    Rendering {
        tools: case["tools"].as_array().cloned().unwrap_or_default(),
        add_generation_prompt: case["add_generation_prompt"].as_bool().unwrap_or(false),
        keep_string_arguments: true,
        ..Rendering::default()
    }
}

#[test]
fn chats_render_and_encode_as_transformers_does() {
    let (tokenizer, template) = (Tokenizer::from_folder(&golden("")).unwrap(), ChatTemplate::default());
    for case in read(&golden("chats.json"))["chats"].as_array().unwrap() {
        let (messages, rendering) = (case["messages"].as_array().unwrap(), rendering(case));
        assert_eq!(template.render(messages, &rendering).unwrap(), case["rendered"].as_str().unwrap(), "{}", case["name"]);
        let tokens = template.tokens(&tokenizer, messages, &rendering, Specials::Recognise).unwrap();
        assert_eq!(tokens.ids, ids(&case["ids"]), "{}", case["name"]);
        let plain = template.tokens(&tokenizer, messages, &rendering, Specials::Plain).unwrap();
        if case["name"] == "control_text_in_user" {
            let control = |ids: &[u32]| ids.iter().filter(|id| **id >= 578).count();
            assert_eq!(control(&plain.ids) + 2, control(&tokens.ids));
            assert_eq!(tokenizer.decode(&plain.ids, false).unwrap(), case["rendered"].as_str().unwrap());
        } else {
            assert_eq!(plain, tokens, "{}", case["name"]);
        }
    }
}

#[test]
fn string_arguments_render_as_the_table_they_hold() {
    let file = read(&golden("chats.json"));
    let case = file["chats"].as_array().unwrap().iter().find(|case| case["name"] == "arguments_as_string").unwrap();
    let rendering = Rendering { keep_string_arguments: false, ..rendering(case) };
    let text = ChatTemplate::default().render(case["messages"].as_array().unwrap(), &rendering).unwrap();
    assert_eq!(text, case["rendered"].as_str().unwrap().replace(r#""{\"x\": 1}""#, r#"{"x": 1}"#));
}

#[test]
fn loss_masks_match_the_vectors() {
    let (tokenizer, template) = (Tokenizer::from_folder(&golden("")).unwrap(), ChatTemplate::default());
    for case in read(&golden("sft_masks.json"))["chats"].as_array().unwrap() {
        for specials in [Specials::Recognise, Specials::Plain] {
            let tokens = template.tokens(&tokenizer, case["messages"].as_array().unwrap(), &rendering(case), specials).unwrap();
            assert_eq!(tokens.ids, ids(&case["input_ids"]), "{}", case["name"]);
            let mask: Vec<u32> = tokens.supervised.iter().map(|on| u32::from(*on)).collect();
            assert_eq!(mask, ids(&case["assistant_mask_content"]), "{}", case["name"]);
        }
    }
}

#[test]
fn both_published_and_shipped_templates_render_the_published_chats() {
    let Some(folder) = published() else { return };
    let tokenizer = Tokenizer::from_folder(&folder).unwrap();
    let own = ChatTemplate::from_folder(&folder).unwrap();
    assert!(own.source() != ChatTemplate::default().source());
    for template in [own, ChatTemplate::default()] {
        let published_cases = read(&folder.join("chat-vectors.json"));
        for case in published_cases.as_array().unwrap() {
            let (messages, rendering) = (case["messages"].as_array().unwrap(), rendering(case));
            assert_eq!(template.render(messages, &rendering).unwrap(), case["text"].as_str().unwrap());
            let tokens = template.tokens(&tokenizer, messages, &rendering, Specials::Recognise).unwrap();
            assert_eq!(tokens.ids, ids(&case["ids"]));
        }
        for case in read(&golden("chats.json"))["chats"].as_array().unwrap() {
            let text = template.render(case["messages"].as_array().unwrap(), &rendering(case)).unwrap();
            assert_eq!(text, case["rendered"].as_str().unwrap(), "{}", case["name"]);
        }
    }
}
