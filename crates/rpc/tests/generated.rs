//! The code in `src/generated` is what the files in `proto` say. After a change of those:
//! `SAGA_WRITE_GENERATED=1 cargo test -p rpc --test generated`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use prost::Message;

const PROTOS: [&str; 3] = ["auth.proto", "product.proto", "purchase.proto"];

fn generated(into: &Path) -> BTreeMap<String, Vec<u8>> {
    let protos = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../proto");
    let descriptors = protox::compile(PROTOS, [protos]).expect("the files in proto are valid");
    let encoded = descriptors.encode_to_vec();
    tonic_prost_build::configure()
        .build_transport(false)
        .out_dir(into)
        .compile_fds(descriptors)
        .expect("code is generated");
    let mut files = read(into);
    // Nothing here asks for or answers what it describes.
    files.remove("purchase.rs");
    files.insert("descriptors.bin".to_owned(), encoded);
    files
}

fn read(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let files = fs::read_dir(folder).expect("the folder is there");
    let file = |path: PathBuf| {
        let name = path.file_name().expect("a file has a name").to_string_lossy().into_owned();
        (name, fs::read(path).expect("it can be read"))
    };
    files.map(|entry| file(entry.expect("an entry").path())).collect()
}

#[test]
fn what_is_committed_is_what_the_protos_say() {
    let scratch = Path::new(env!("CARGO_TARGET_TMPDIR")).join("generated");
    let _ = fs::remove_dir_all(&scratch);
    fs::create_dir_all(&scratch).expect("a scratch folder");
    let fresh = generated(&scratch);
    let committed = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/generated");
    if std::env::var_os("SAGA_WRITE_GENERATED").is_some() {
        for (name, content) in &fresh {
            fs::write(committed.join(name), content).expect("it can be written");
        }
    }
    let committed = read(&committed);
    let names = |files: &BTreeMap<String, Vec<u8>>| files.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&committed), names(&fresh));
    for (name, content) in fresh {
        assert!(committed[&name] == content, "src/generated/{name} is not what the files in proto say");
    }
}
