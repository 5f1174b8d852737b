//! The program as its users see it: arguments, settings, exit codes, signals, and who owns a data directory.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends")]

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// The promise to whoever sends SIGTERM.
const STOP_WITHIN: Duration = Duration::from_secs(10);

/// `saga` without the settings of whoever runs the tests.
fn saga(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_saga"));
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("SAGA_")) {
        command.env_remove(name);
    }
    command.args(args).stdin(Stdio::null());
    command
}

fn run(command: &mut Command) -> Output {
    command.output().unwrap()
}

fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// The exit code and what was written to standard error.
fn failure(command: &mut Command) -> (Option<i32>, String) {
    let output = run(command);
    assert!(output.stdout.is_empty(), "{output:?}");
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

/// A fresh folder that is removed in the end.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("cli-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    fn file(&self, name: &str, text: &str) -> String {
        let path = self.path(name);
        fs::write(&path, text).unwrap();
        path
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().to_owned()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A shop on free ports that has printed its banner.
struct Shop {
    process: Child,
    banner: String,
    log: BufReader<ChildStderr>,
}

impl Shop {
    fn start(data_dir: &str) -> Shop {
        Shop::wait(Shop::command(data_dir))
    }

    fn command(data_dir: &str) -> Command {
        let mut command = saga(&["--data-dir", data_dir, "--no-demo-data"]);
        command.args(["--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"]);
        command
    }

    /// Starts it, and waits for its banner.
    fn wait(mut command: Command) -> Shop {
        let mut process = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut out = BufReader::new(process.stdout.take().unwrap());
        let mut log = BufReader::new(process.stderr.take().unwrap());
        let mut banner = String::new();
        while !banner.contains("  stop ") {
            if out.read_line(&mut banner).unwrap() == 0 {
                let mut text = String::new();
                log.read_to_string(&mut text).unwrap();
                panic!("saga ended before it was ready: {banner}{text}");
            }
        }
        Shop { process, banner, log }
    }

    fn pid(&self) -> u32 {
        self.process.id()
    }

    /// The address in the banner's line of this name.
    fn address(&self, line: &str) -> SocketAddr {
        let found = self.banner.lines().find(|text| text.trim_start().starts_with(line));
        let url = found.unwrap_or_else(|| panic!("no {line:?} in {}", self.banner));
        url.split("http://").nth(1).unwrap().split('/').next().unwrap().parse().unwrap()
    }

    fn signal(&self, name: &str) {
        // The shell's own kill: a minimal system has no program of this name.
        let line = format!("kill -{name} {}", self.pid());
        assert!(Command::new("sh").args(["-c", &line]).status().unwrap().success());
    }

    /// Reads the log up to a line with this text.
    fn wait_for_log(&mut self, text: &str) {
        let mut line = String::new();
        while !line.contains(text) {
            line.clear();
            assert_ne!(self.log.read_line(&mut line).unwrap(), 0, "the log ended without {text:?}");
        }
    }

    /// The exit status, and what of the log was not read yet.
    fn end(mut self) -> (ExitStatus, String) {
        let mut log = String::new();
        self.log.read_to_string(&mut log).unwrap();
        (self.process.wait().unwrap(), log)
    }

    /// A request whose body is being waited for and does not come.
    fn hold_up(&self) -> TcpStream {
        let mut client = TcpStream::connect(self.address("shop API")).unwrap();
        let head = "POST /api/account/auth/login HTTP/1.1\r\nHost: shop\r\nContent-Length: 9\r\n";
        write!(client, "{head}Expect: 100-continue\r\n\r\n").unwrap();
        let mut answer = [0; 12];
        client.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"HTTP/1.1 100");
        client
    }
}

impl Drop for Shop {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn get(address: SocketAddr, path: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: shop\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

fn shown(command: &mut Command) -> Vec<Value> {
    serde_json::from_str(&stdout(&run(command))).unwrap()
}

fn setting<'a>(settings: &'a [Value], key: &str) -> &'a Value {
    settings.iter().find(|setting| setting["key"] == key).unwrap_or_else(|| panic!("no {key}"))
}

#[test]
fn it_tells_its_version() {
    assert_eq!(stdout(&run(&mut saga(&["--version"]))), format!("saga {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn a_wrong_argument_is_a_usage_error() {
    let (code, message) = failure(&mut saga(&["--lisen", "x"]));
    assert_eq!(code, Some(2));
    assert!(message.contains("--lisen") && message.contains("--listen"), "{message}");
}

#[test]
fn the_last_layer_wins_and_is_named() {
    let folder = Folder::new("layers");
    let text =
        "data_dir = \"from-file\"\nlisten = \"127.0.0.1:1\"\n[payment]\nlimit = 1\n[db]\nreaders = 3\n";
    let file = folder.file("saga.toml", text);
    let settings = shown(
        saga(&["config", "show", "--json", "--config", &file, "--listen", "127.0.0.1:3"])
            .env("SAGA_LISTEN", "127.0.0.1:2")
            .env("SAGA_PAYMENT__LIMIT", "2"),
    );
    for (key, value, kind, name) in [
        ("listen", Value::from("127.0.0.1:3"), "flag", Value::from("--listen")),
        ("payment.limit", Value::from(2), "environment", Value::from("SAGA_PAYMENT__LIMIT")),
        ("data_dir", Value::from("from-file"), "file", Value::from(file.as_str())),
        ("db.readers", Value::from(3), "file", Value::from(file.as_str())),
        ("demo_data", Value::from(true), "default", Value::Null),
    ] {
        let setting = setting(&settings, key);
        assert_eq!(setting["value"], value, "{setting}");
        assert_eq!(setting["source"]["kind"], kind, "{setting}");
        assert_eq!(setting["source"]["name"], name, "{setting}");
    }
}

#[test]
fn the_table_has_every_setting_that_the_json_has() {
    let settings = shown(&mut saga(&["config", "show", "--json"]));
    let table = stdout(&run(saga(&["config", "show", "--no-demo-data"]).env("SAGA_DB__READERS", "4")));
    assert!(settings.len() > 30);
    assert_eq!(table.lines().count(), settings.len());
    let row = |key: &str| {
        let line = table.lines().find(|line| line.split_whitespace().next() == Some(key));
        line.unwrap_or_else(|| panic!("no {key} in\n{table}"))
            .split_whitespace()
            .skip(1)
            .collect::<Vec<_>>()
            .join(" ")
    };
    for setting in &settings {
        row(setting["key"].as_str().unwrap());
    }
    assert_eq!(row("db.readers"), "4 environment variable SAGA_DB__READERS");
    assert_eq!(row("demo_data"), "false flag --no-demo-data");
    assert_eq!(row("catalog.admin_token"), "(not set) default");
    assert_eq!(row("listen"), "\"127.0.0.1:8080\" default");
}

#[test]
fn the_file_can_be_named_by_a_variable() {
    let folder = Folder::new("variable");
    let file = folder.file("saga.toml", "[saga]\nbatch = 7\n");
    let settings = shown(saga(&["config", "show", "--json"]).env("SAGA_CONFIG", &file));
    assert_eq!(setting(&settings, "saga.batch")["value"], 7);
}

#[test]
fn a_secret_is_masked_wherever_it_came_from() {
    let folder = Folder::new("secret");
    let file = folder.file("saga.toml", "[catalog]\nadmin_token = \"open-sesame-open-sesame\"\n");
    let from_file = &["config", "show", "--config", &file];
    let from_environment = &["config", "show", "--json"];
    for command in [
        &mut saga(from_file),
        saga(from_environment).env("SAGA_CATALOG__ADMIN_TOKEN", "open-sesame-open-sesame"),
    ] {
        let text = stdout(&run(command));
        assert!(text.contains("********") && !text.contains("sesame"), "{text}");
    }
    for broken in ["[catalog]\nadmin_token = open-sesame", "[catalog]\nadmin_token = [\"open-sesame\"]"] {
        let (code, message) = failure(&mut saga(&["--config", &folder.file("broken.toml", broken)]));
        assert_eq!(code, Some(2));
        assert!(!message.contains("sesame"), "{message}");
    }
}

#[test]
fn what_does_not_exist_is_named_with_its_source() {
    let folder = Folder::new("unknown");
    let file = folder.file("saga.toml", "[paymnet]\nlimit = 1\n[db]\nreader = 1\n");
    let (code, message) = failure(saga(&["--config", &file]).env("SAGA_PAYMENT_LIMIT", "1"));
    assert_eq!(code, Some(2));
    let expected = format!(
        "saga: db.reader (file {file}): no such setting; did you mean db.readers?\n\
         saga: paymnet.limit (file {file}): no such setting; did you mean payment.limit?\n\
         saga: SAGA_PAYMENT_LIMIT (environment variable SAGA_PAYMENT_LIMIT): no such setting; did you mean \
         SAGA_PAYMENT__LIMIT?\n"
    );
    assert_eq!(message, expected);
}

#[test]
fn a_wrong_value_is_named_with_its_source_and_what_is_allowed() {
    let folder = Folder::new("wrong");
    let file = folder.file("saga.toml", "[http]\ncors_allowed_origins = [1]\n");
    let (code, message) = failure(&mut saga(&["--config", &file]));
    let expected = format!(
        "saga: http.cors_allowed_origins = [1] (file {file}): expected a list of texts, such as \
         [\"https://shop.example\"]\n"
    );
    assert_eq!((code, message), (Some(2), expected));
    let (code, message) = failure(saga(&["--listen", "8080"]).env("SAGA_DB__READERS", "0"));
    let expected =
        "saga: listen = \"8080\" (flag --listen): expected IP:PORT, such as 127.0.0.1:8080 or [::]:8080\n";
    assert_eq!((code, message.as_str()), (Some(2), expected));
    let (code, message) = failure(saga(&[]).env("SAGA_DB__READERS", "0"));
    let expected = "saga: db.readers = 0 (environment variable SAGA_DB__READERS): expected a whole number from 1 to 64\n";
    assert_eq!((code, message.as_str()), (Some(2), expected));
}

#[test]
fn a_file_that_cannot_be_read_is_named() {
    let folder = Folder::new("file");
    let missing = folder.path("missing.toml");
    let (code, message) = failure(&mut saga(&["--config", &missing]));
    assert_eq!(code, Some(2));
    assert!(message.contains(&missing) && message.contains("No such file"), "{message}");
    let broken = folder.file("broken.toml", "demo_data = true\n[payment\n");
    let (code, message) = failure(&mut saga(&["--config", &broken]));
    assert_eq!(code, Some(2));
    assert!(message.contains(&format!("{broken}, line 2, is not valid TOML")), "{message}");
}

#[test]
fn a_log_filter_that_does_not_parse_is_named_with_its_source() {
    let folder = Folder::new("filter");
    let (code, message) =
        failure(saga(&["--data-dir", &folder.path("data")]).env("SAGA_LOG__FILTER", "loud=very"));
    assert_eq!(code, Some(2));
    assert!(message.contains("loud=very") && message.contains("SAGA_LOG__FILTER"), "{message}");
}

#[test]
fn a_shop_that_others_can_reach_needs_an_admin_token() {
    let (code, message) = failure(&mut saga(&["--listen", "0.0.0.0:0"]));
    assert_eq!(code, Some(2));
    assert!(message.contains("catalog.admin_token") && message.contains("0.0.0.0:0"), "{message}");
}

#[test]
fn completions_for_the_usual_shells() {
    for (shell, mark) in [("bash", "complete -F"), ("zsh", "#compdef saga"), ("fish", "complete -c saga")] {
        let script = stdout(&run(&mut saga(&["completions", shell])));
        assert!(script.contains(mark) && script.contains("data-dir"), "{shell}: {script}");
    }
}

#[test]
fn the_banner_names_what_answers_and_the_directory_is_private() {
    let folder = Folder::new("banner");
    let data = folder.path("data");
    let shop = Shop::start(&data);
    for line in ["metrics", "alive", "ready"] {
        let path = match line {
            "metrics" => "/metrics",
            "alive" => "/healthz",
            _ => "/readyz",
        };
        let answer = get(shop.address(line), path);
        assert!(answer.starts_with("HTTP/1.1 200"), "{line}: {answer}");
    }
    assert!(get(shop.address("shop API"), "/nowhere").starts_with("HTTP/1.1 404"));
    let absolute = fs::canonicalize(&data).unwrap();
    assert!(shop.banner.contains(absolute.to_str().unwrap()), "{}", shop.banner);
    assert!(shop.banner.contains("open: everybody"), "{}", shop.banner);
    assert!(shop.banner.contains(&format!("kill {}", shop.pid())), "{}", shop.banner);
    assert_eq!(absolute.metadata().unwrap().permissions().mode() & 0o777, 0o700);
}

#[test]
fn a_second_process_on_the_same_directory_is_refused_until_the_first_is_gone() {
    let folder = Folder::new("second");
    let data = folder.path("data");
    let first = Shop::start(&data);
    for command in [&["up", "--listen", "127.0.0.1:0"][..], &["seed"]] {
        let (code, message) = failure(saga(command).env("SAGA_DATA_DIR", &data));
        assert_eq!(code, Some(3), "{message}");
        let absolute = fs::canonicalize(&data).unwrap();
        assert!(message.contains(absolute.to_str().unwrap()), "{message}");
        assert!(message.contains(&format!("in use by process {};", first.pid())), "{message}");
    }
    assert!(get(first.address("ready"), "/readyz").starts_with("HTTP/1.1 200"));
    first.signal("KILL");
    first.end();
    Shop::start(&data);
}

#[test]
fn an_address_that_is_taken_is_named() {
    let folder = Folder::new("taken");
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let (code, message) = failure(&mut saga(&["--data-dir", &folder.path("data"), "--listen", &address]));
    assert_eq!(code, Some(1), "{message}");
    assert!(message.contains(&address), "{message}");
}

#[test]
fn both_signals_end_it_in_order_and_in_time() {
    let folder = Folder::new("signals");
    for name in ["TERM", "INT"] {
        let shop = Shop::start(&folder.path("data"));
        // A client that is connected and says nothing must not hold up the end.
        let _idle = TcpStream::connect(shop.address("shop API")).unwrap();
        let begun = Instant::now();
        shop.signal(name);
        let (status, log) = shop.end();
        assert_eq!(status.code(), Some(0), "{log}");
        assert!(begun.elapsed() < STOP_WITHIN, "{:?}", begun.elapsed());
        // Standard error is a pipe here, so each line is JSON.
        let lines: Vec<Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let messages: Vec<&str> = lines.iter().filter_map(|line| line["message"].as_str()).collect();
        assert!(messages.contains(&"ready") && messages.last() == Some(&"stopped"), "{messages:?}");
    }
}

#[test]
fn a_client_that_does_not_finish_is_cut_off_at_the_deadline() {
    let folder = Folder::new("cut");
    let mut command = Shop::command(&folder.path("data"));
    command.env("SAGA_HTTP__DRAIN_TIMEOUT_MS", "300");
    let shop = Shop::wait(command);
    let mut client = shop.hold_up();
    let begun = Instant::now();
    shop.signal("TERM");
    let (status, log) = shop.end();
    assert_eq!(status.code(), Some(0), "{log}");
    assert!((Duration::from_millis(300)..STOP_WITHIN).contains(&begun.elapsed()), "{:?}", begun.elapsed());
    let mut rest = Vec::new();
    let _ = client.read_to_end(&mut rest);
    assert!(!rest.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&rest));
}

#[test]
fn a_second_signal_does_not_wait_for_anybody() {
    let folder = Folder::new("twice");
    let mut shop = Shop::start(&folder.path("data"));
    let _client = shop.hold_up();
    let begun = Instant::now();
    shop.signal("TERM");
    shop.wait_for_log("stopping");
    shop.signal("INT");
    let (status, log) = shop.end();
    assert_eq!(status.code(), Some(130), "{log}");
    assert!(log.contains("a second signal"), "{log}");
    // Well below the time that requests in flight get.
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
}

#[test]
fn products_are_seeded_once() {
    let folder = Folder::new("seed");
    let data = folder.path("data");
    let first = stdout(&run(&mut saga(&["seed", "--data-dir", &data])));
    assert!(first.starts_with("demo data: added"), "{first}");
    let again = stdout(&run(&mut saga(&["seed", "--data-dir", &data])));
    assert!(again.starts_with("demo data: not added"), "{again}");
    let shop = Shop::start(&data);
    let products = get(shop.address("shop API"), "/api/products?size=10");
    assert!(products.contains("\"id\":"), "{products}");
}

#[test]
fn errors_are_told_even_if_the_log_is_off() {
    let folder = Folder::new("off");
    let in_the_way = folder.file("data", "");
    let (code, message) = failure(saga(&["--data-dir", &in_the_way]).env("SAGA_LOG__FILTER", "off"));
    assert_eq!(code, Some(1));
    assert!(
        message.starts_with(&format!("saga: cannot use {in_the_way} as the data directory")),
        "{message}"
    );
}

/// A port that nobody listens to, a moment ago at least.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

#[test]
fn a_secret_may_come_from_a_file_and_servers_have_short_names() {
    let folder = Folder::new("secret-file");
    let url = folder.file("url", "mysql://root:sesame@db:3306\n");
    let token = folder.file("token", "open-sesame-open-sesame\r\n");
    let file = folder.file("saga.toml", &format!("[catalog]\nadmin_token_file = {token:?}\n"));
    let settings = shown(
        saga(&["config", "show", "--json", "--config", &file, "--redis", "redis://:sesame@c:1"])
            .env("SAGA_MYSQL__URL_FILE", &url)
            .env("SAGA_NATS", "nats://u:sesame@a:1,nats://b:1"),
    );
    for (key, value, source) in [
        ("mysql.url", "mysql://********@db:3306", "SAGA_MYSQL__URL_FILE"),
        ("nats.url", "nats://********@a:1,nats://b:1", "SAGA_NATS"),
        ("redis.url", "redis://********@c:1", "--redis"),
        ("catalog.admin_token", "********", file.as_str()),
    ] {
        let setting = setting(&settings, key);
        assert_eq!(
            (&setting["value"], &setting["source"]["name"]),
            (&value.into(), &source.into()),
            "{setting}"
        );
    }
    let missing = folder.path("missing");
    let (code, message) = failure(saga(&["up"]).env("SAGA_MYSQL_FILE", &missing));
    assert_eq!(code, Some(2), "{message}");
    assert!(message.contains("SAGA_MYSQL_FILE") && message.contains(&missing), "{message}");
}

#[test]
fn an_address_that_is_none_is_refused_without_showing_it() {
    for (name, value) in [
        ("SAGA_MYSQL", "postgres://root:sesame@db"),
        ("SAGA_NATS", "root:sesame@bus"),
        ("SAGA_REDIS", "redis://"),
        ("SAGA_PEERS__ORDER", "order"),
        ("SAGA_NATS__PREFIX", "a.b"),
    ] {
        let (code, message) = failure(saga(&["up"]).env(name, value));
        assert_eq!(code, Some(2), "{message}");
        assert!(message.contains("expected") && !message.contains("sesame"), "{message}");
    }
}

/// It does not wait: that would not help.
#[test]
fn a_file_of_the_broker_that_is_no_such_is_named() {
    let folder = Folder::new("broker-files");
    let (missing, empty) = (folder.path("missing.pem"), folder.file("empty.pem", ""));
    let end = |variables: &[(&str, &str)]| {
        let mut command = saga(&["run", "orchestrator", "--listen", "127.0.0.1:0"]);
        command.args(["--admin-listen", "127.0.0.1:0"]).env("SAGA_NATS", "tls://127.0.0.1:1");
        let mut process = command.envs(variables.iter().copied()).stderr(Stdio::piped()).spawn().unwrap();
        let mut log = String::new();
        for line in BufReader::new(process.stderr.take().unwrap()).lines() {
            log.extend([line.unwrap(), "\n".to_owned()]);
            if log.contains("waiting for a server") {
                process.kill().unwrap();
            }
        }
        (process.wait().unwrap().code(), log)
    };
    for (setting, file, why) in [
        ("SAGA_NATS__CREDENTIALS_FILE", &missing, "No such file"),
        ("SAGA_NATS__ROOT_CERTIFICATES", &missing, "No such file"),
        ("SAGA_NATS__ROOT_CERTIFICATES", &empty, "no certificate"),
    ] {
        let (code, log) = end(&[(setting, file)]);
        assert_eq!(code, Some(1), "{log}");
        assert!(log.contains(file) && log.contains(why), "{log}");
    }
    let (code, log) = end(&[("SAGA_NATS__CLIENT_CERTIFICATE", &empty), ("SAGA_NATS__CLIENT_KEY", &missing)]);
    assert_eq!(code, Some(1), "{log}");
    assert!(log.contains(&empty) && log.contains("no certificate"), "{log}");
    let (code, log) = end(&[("SAGA_NATS__CLIENT_CERTIFICATE", &empty)]);
    assert_eq!(code, Some(2), "{log}");
    assert!(log.contains("nats.client_certificate is set, but nats.client_key is not"), "{log}");
}

#[test]
fn what_a_role_lacks_is_told_at_once() {
    let (code, message) = failure(&mut saga(&["up", "--processes", "2"]));
    assert_eq!(code, Some(2), "{message}");
    assert!(message.contains("needs mysql.url") && message.contains("needs nats.url"), "{message}");
    let (code, message) = failure(saga(&["up"]).env("SAGA_REDIS", "redis://127.0.0.1:1"));
    assert_eq!(code, Some(2), "{message}");
    assert!(message.contains("redis.url is set, but mysql.url is not"), "{message}");
    let (code, message) = failure(&mut saga(&["run", "gateway"]));
    assert_eq!(code, Some(2), "{message}");
    assert_eq!(message.lines().count(), 5, "{message}");
    let (code, message) = failure(&mut saga(&["run", "cashier"]));
    assert_eq!(code, Some(2), "{message}");
    assert!(message.contains("orchestrator"), "{message}");
}

#[test]
fn a_replica_without_its_servers_waits_and_says_for_what() {
    let admin = SocketAddr::from(([127, 0, 0, 1], free_port()));
    let (mysql, nats) = (free_port(), free_port());
    let mut command =
        saga(&["run", "order", "--listen", "127.0.0.1:0", "--admin-listen", &admin.to_string()]);
    command.env("SAGA_MYSQL", format!("mysql://root:sesame@127.0.0.1:{mysql}"));
    command.env("SAGA_NATS", format!("nats://root:sesame@127.0.0.1:{nats}"));
    command.env("SAGA_PEERS__ACCOUNT", "127.0.0.1:1").env("SAGA_PEERS__PRODUCT", "127.0.0.1:1");
    let mut process = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let mut log = BufReader::new(process.stderr.take().unwrap());
    let mut line = String::new();
    while !line.contains("waiting for a server") {
        line.clear();
        assert_ne!(log.read_line(&mut line).unwrap(), 0, "the log ended");
    }
    assert!(!line.contains("sesame"), "{line}");
    let answer = get(admin, "/readyz");
    assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("waiting: "), "{answer}");
    assert!(answer.contains(&nats.to_string()) && !answer.contains("sesame"), "{answer}");
    assert!(get(admin, "/healthz").starts_with("HTTP/1.1 200"));
    assert!(
        Command::new("sh").args(["-c", &format!("kill -TERM {}", process.id())]).status().unwrap().success()
    );
    let mut rest = String::new();
    log.read_to_string(&mut rest).unwrap();
    assert_eq!(process.wait().unwrap().code(), Some(0), "{rest}");
}

/// As a supervisor's child does when the supervisor has gone.
#[test]
fn a_supervised_replica_ends_with_its_standard_input() {
    let mut command = saga(&["run", "orchestrator", "--supervised", "--listen", "127.0.0.1:0"]);
    command
        .args(["--admin-listen", "127.0.0.1:0"])
        .env("SAGA_NATS", format!("nats://127.0.0.1:{}", free_port()));
    let mut process = command.stdin(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut log = BufReader::new(process.stderr.take().unwrap());
    let mut line = String::new();
    while !line.contains("waiting for a server") {
        line.clear();
        assert_ne!(log.read_line(&mut line).unwrap(), 0, "the log ended");
    }
    drop(process.stdin.take());
    let mut rest = String::new();
    log.read_to_string(&mut rest).unwrap();
    assert_eq!(process.wait().unwrap().code(), Some(0), "{rest}");
}

#[test]
fn the_doctor_says_what_is_wrong_and_what_to_do() {
    let folder = Folder::new("doctor");
    let data = folder.path("data");
    let healthy = run(&mut saga(&["doctor", "--json", "--data-dir", &data]));
    let findings: Vec<Value> = serde_json::from_str(&stdout(&healthy)).unwrap();
    assert_eq!(findings.len(), 6, "{findings:?}");
    assert!(
        findings.iter().all(|finding| finding["verdict"] == "ok" && finding["advice"].is_null()),
        "{findings:?}"
    );
    assert!(!Path::new(&data).exists(), "it only looks");

    let nobody = free_port();
    let mut command = saga(&["doctor", "--json", "--data-dir", &data]);
    command.env("SAGA_MYSQL", format!("mysql://root:sesame@127.0.0.1:{nobody}"));
    command.env("SAGA_NATS", format!("nats://127.0.0.1:{nobody}"));
    command.env("SAGA_REDIS", format!("redis://127.0.0.1:{nobody}"));
    let ill = run(&mut command);
    assert_eq!(ill.status.code(), Some(1), "{ill:?}");
    let text = String::from_utf8(ill.stdout).unwrap();
    assert!(!text.contains("sesame"), "{text}");
    let findings: Vec<Value> = serde_json::from_str(&text).unwrap();
    for (subject, verdict) in [("mysql order", "failure"), ("nats 127", "failure"), ("redis 127", "warning")]
    {
        let of = |finding: &&Value| finding["subject"].as_str().unwrap().starts_with(subject);
        let finding = findings.iter().find(of).unwrap_or_else(|| panic!("no {subject} in {text}"));
        assert_eq!(finding["verdict"], verdict, "{finding}");
        assert!(finding["advice"].is_string(), "{finding}");
    }

    fs::create_dir_all(&data).unwrap();
    fs::write(Path::new(&data).join("order.db"), "this is no database, whatever its name says").unwrap();
    let damaged = run(&mut saga(&["doctor", "--data-dir", &data]));
    assert_eq!(damaged.status.code(), Some(1), "{damaged:?}");
    let table = String::from_utf8(damaged.stdout).unwrap();
    assert!(table.lines().any(|line| line.starts_with("FAIL  database order")), "{table}");
}

#[test]
fn a_new_key_is_made_in_the_folder_of_keys_and_nobody_else_may_read_it() {
    let folder = Folder::new("new-key");
    let data = folder.path("data");
    let made = run(&mut saga(&["keys", "new", "--data-dir", &data]));
    assert!(made.status.success(), "{made:?}");
    let mut files = fs::read_dir(Path::new(&data).join("keys")).expect("the folder of keys");
    let file = files.next().expect("a key").expect("an entry");
    let mode = file.metadata().expect("its mode").permissions().mode();
    assert_eq!((mode & 0o7777, files.count()), (0o600, 0));
}

#[test]
fn nobody_there_is_not_healthy() {
    let nobody = format!("127.0.0.1:{}", free_port());
    let asked = run(&mut saga(&["health", "--admin-listen", &nobody]));
    assert_eq!(asked.status.code(), Some(1), "{asked:?}");
    assert!(String::from_utf8_lossy(&asked.stderr).contains("not ready"), "{asked:?}");
}
