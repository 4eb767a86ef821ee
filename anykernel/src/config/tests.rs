use super::*;
use alloc::string::ToString;
use proptest::prelude::*;
use serde_json::{Map, Value, json};

fn error(json: &str) -> String {
    Config::parse(json).expect_err(json)
}

#[test]
fn every_mistake_is_one_line_that_names_the_place() {
    for (json, line) in [
        ("", "not JSON: EOF while parsing a value at line 1 column 0"),
        ("[]", "it is a list, but must be an object"),
        (r#"{"hostnam":"a"}"#, "unknown key `hostnam`; did you mean `hostname`?"),
        (r#"{"interfaces":[{"ipv5":"none"}]}"#, "unknown key `interfaces[0].ipv5`; did you mean `ipv4`?"),
        (r#"{"tcp":{"recieve_bytes":1}}"#, "unknown key `tcp.recieve_bytes`; did you mean `receive_bytes`?"),
        (r#"{"cache":{"size":1}}"#, "unknown key `cache.size`; there are `bytes`, `read_ahead_bytes`"),
        (
            r#"{"mounts":[{"source":"disk0","target":"/"},{"source":"disk1","target":"/b","readonly":true}]}"#,
            "unknown key `mounts[1].readonly`; did you mean `read_only`?",
        ),
        (r#"{"mounts":[{"source":"disk0"}]}"#, "`mounts[0].target` is missing"),
        (
            r#"{"mounts":[{"source":"disk0","target":"/","read_only":"yes"}]}"#,
            "`mounts[0].read_only` is a string, but must be true or false",
        ),
        (
            r#"{"mounts":[{"source":"disk0","target":"data"}]}"#,
            r#"`mounts[0].target` is "data", but must be an absolute path"#,
        ),
        (
            r#"{"mounts":[{"source":"disk0","target":"/"},{"source":"disk1","target":"/"}]}"#,
            r#"`mounts[1].target` is "/", as `mounts[0].target`"#,
        ),
        (
            r#"{"mounts":[{"source":"/dev/sda","target":"/"}]}"#,
            r#"`mounts[0].source` is "/dev/sda", but must be a block device as "disk0" or "disk0p1", or "tmpfs""#,
        ),
        (r#"{"mounts":{}}"#, "`mounts` is an object, but must be a list"),
        (r#"{"app":"httpd"}"#, "`app` is a string, but must be a list"),
        (r#"{"app":["httpd",1]}"#, "`app[1]` is a number, but must be a string"),
        (r#"{"log":"verbose"}"#, r#"`log` is "verbose", but must be off, error, warn, info, debug or trace"#),
        (r#"{"log":null}"#, "`log` is null, but must be a string"),
        (
            r#"{"hostname":"my_host"}"#,
            r#"`hostname` is "my_host", but must be a host name of at most 63 letters, digits and hyphens"#,
        ),
        (
            r#"{"interfaces":[{},{"ipv4":"10.0.2.15"}]}"#,
            r#"`interfaces[1].ipv4` is "10.0.2.15", but must be "dhcp", "none" or an address with prefix length as "10.0.2.15/24""#,
        ),
        (
            r#"{"interfaces":[{"ipv6":"fd00::2/129"}]}"#,
            r#"`interfaces[0].ipv6` is "fd00::2/129", but must be "auto", "none" or an address with prefix length as "fd00::2/64""#,
        ),
        (
            r#"{"interfaces":[{"gateway":"10.0.2"}]}"#,
            r#"`interfaces[0].gateway` is "10.0.2", but must be an IP address"#,
        ),
        (
            r#"{"interfaces":[{"dns":["1.1.1.1","dns"]}]}"#,
            r#"`interfaces[0].dns[1]` is "dns", but must be an IP address"#,
        ),
        (r#"{"workers":-1}"#, "`workers` must be a whole number from 0 to 4294967295"),
        (r#"{"workers":1.5}"#, "`workers` must be a whole number from 0 to 4294967295"),
        (
            r#"{"tcp":{"connections":4294967296}}"#,
            "`tcp.connections` must be a whole number from 0 to 4294967295",
        ),
        (r#"{"cache":{"bytes":"1M"}}"#, "`cache.bytes` is a string, but must be a whole number"),
    ] {
        assert_eq!(error(json), alloc::format!("configuration: {line}"));
    }
}

#[test]
fn an_error_stays_one_line() {
    let line = error("{\"log\":\"a\\nb\\u0007\"}");
    assert!(!line.contains(char::is_control), "{line:?}");
    let line = error("{\"a\\nb\":1}");
    assert!(!line.contains(char::is_control), "{line:?}");
}

#[test]
fn reads_everything() {
    let config = Config::parse(
        r#"{
            "hostname": "web.example", "log": "debug", "app": ["httpd", "--port", "80"], "workers": 2,
            "forward": true, "usb": ["1-2.3", "46f4:0001", "class:03"],
            "mounts": [{"source": "disk0p1", "target": "/", "kind": "ext4", "read_only": true},
                       {"source": "tmpfs", "target": "/tmp", "kind": null}],
            "interfaces": [{"ipv4": "10.0.2.15/24", "ipv6": "fd00::2/64", "gateway": "10.0.2.2",
                            "routes": ["10.1.0.0/16 via 10.0.2.9"], "dns": ["10.0.2.3"]}, {}],
            "tcp": {"receive_bytes": 1, "send_bytes": 2, "connections": 3},
            "cache": {"bytes": 18446744073709551615, "read_ahead_bytes": 4}
        }"#,
    );
    let mount = |source: &str, target: &str, kind: Option<&str>, read_only| Mount {
        source: source.into(),
        target: target.into(),
        kind: kind.map(Into::into),
        read_only,
    };
    let expected = Config {
        hostname: "web.example".into(),
        log: "debug".into(),
        app: ["httpd", "--port", "80"].map(Into::into).into(),
        mounts: [mount("disk0p1", "/", Some("ext4"), true), mount("tmpfs", "/tmp", None, false)].into(),
        interfaces: [
            Interface {
                ipv4: "10.0.2.15/24".into(),
                ipv6: "fd00::2/64".into(),
                gateway: Some("10.0.2.2".into()),
                routes: ["10.1.0.0/16 via 10.0.2.9".into()].into(),
                dns: ["10.0.2.3".into()].into(),
            },
            Interface::default(),
        ]
        .into(),
        usb: ["1-2.3", "46f4:0001", "class:03"].map(Into::into).into(),
        forward: true,
        workers: 2,
        tcp: Tcp { receive_bytes: 1, send_bytes: 2, connections: 3 },
        cache: Cache { bytes: u64::MAX, read_ahead_bytes: 4 },
    };
    assert_eq!(config, Ok(expected.clone()));
    assert_eq!(Config::parse(&expected.to_json()), Ok(expected));
    assert_eq!(Config::parse("{}"), Ok(Config::default()));
}

/// A configuration with every key.
fn full() -> Value {
    let config = Config {
        mounts: [Mount {
            source: "disk0".into(),
            target: "/".into(),
            kind: Some("ext4".into()),
            read_only: false,
        }]
        .into(),
        interfaces: [Interface { gateway: Some("10.0.2.2".into()), ..Interface::default() }].into(),
        ..Config::default()
    };
    serde_json::from_str(&config.to_json()).unwrap()
}

fn keys(map: &Map<String, Value>) -> Vec<&String> {
    map.keys().collect()
}

/// The schema's keys are the struct's keys, at every level, and both have the same defaults.
#[test]
fn the_schema_says_what_the_struct_says() {
    let schema: Value = serde_json::from_str(SCHEMA).unwrap();
    let full = full();
    let properties = |schema: &Value| schema["properties"].as_object().unwrap().clone();
    let root = properties(&schema);
    let levels = [
        (root.clone(), full.clone()),
        (properties(&schema["$defs"]["mount"]), full["mounts"][0].clone()),
        (properties(&schema["$defs"]["interface"]), full["interfaces"][0].clone()),
        (properties(&schema["$defs"]["tcp"]), full["tcp"].clone()),
        (properties(&schema["$defs"]["cache"]), full["cache"].clone()),
    ];
    for (described, written) in &levels {
        assert_eq!(keys(described), keys(written.as_object().unwrap()));
        for (key, about) in described {
            let text = about["description"].as_str();
            assert!(text.is_some() || about["$ref"].is_string(), "`{key}` is not described");
        }
    }
    // A document of the schema's defaults is the default configuration.
    let mut defaults = Map::new();
    for (key, about) in &root {
        let nested = about["$ref"].as_str().and_then(|name| name.strip_prefix("#/$defs/"));
        let value = match (&about["default"], nested) {
            (Value::Null, Some(name)) => properties(&schema["$defs"][name])
                .iter()
                .map(|(key, about)| (key.clone(), about["default"].clone()))
                .collect::<Map<_, _>>()
                .into(),
            (value, _) => value.clone(),
        };
        defaults.insert(key.clone(), value);
    }
    assert_eq!(Config::parse(&Value::from(defaults).to_string()), Ok(Config::default()));
    let interface: Map<_, _> =
        levels[2].0.iter().map(|(key, about)| (key.clone(), about["default"].clone())).collect();
    let one = json!({ "interfaces": [interface] }).to_string();
    assert_eq!(Config::parse(&one).unwrap().interfaces, [Interface::default()]);
    // Every object is closed and every `$ref` leads somewhere.
    for (name, about) in schema["$defs"].as_object().unwrap().iter().chain([(&"root".into(), &schema)]) {
        assert!(about["type"] != "object" || about["additionalProperties"] == false, "{name} is open");
    }
    for name in SCHEMA.split("\"#/$defs/").skip(1).filter_map(|rest| rest.split('"').next()) {
        assert!(schema["$defs"][name].is_object(), "#/$defs/{name}");
    }
}

/// Each key is taken away, misspelt, and given a value of every other type.
#[test]
fn every_key_is_checked() {
    fn visit(value: &Value, path: &mut Vec<String>, out: &mut Vec<Vec<String>>) {
        let children: Vec<(String, &Value)> = match value {
            Value::Object(map) => map.iter().map(|(key, value)| (key.clone(), value)).collect(),
            Value::Array(list) => {
                list.iter().enumerate().map(|(n, value)| (alloc::format!("{n}"), value)).collect()
            }
            _ => Vec::new(),
        };
        for (key, child) in children {
            path.push(key);
            out.push(path.clone());
            visit(child, path, out);
            path.pop();
        }
    }
    let full = full();
    let mut paths = Vec::new();
    visit(&full, &mut Vec::new(), &mut paths);
    assert!(paths.len() > 20);
    for path in paths {
        let pointer = alloc::format!("/{}", path.join("/"));
        for wrong in [json!({"a": 1}), json!([[]]), json!(-1), json!(true), json!("\u{0}")] {
            let mut changed = full.clone();
            let place = changed.pointer_mut(&pointer).unwrap();
            if place.is_boolean() && wrong.is_boolean() {
                continue;
            }
            *place = wrong;
            let line = error(&changed.to_string());
            let name = path.last().unwrap();
            assert!(line.contains(name.as_str()), "{pointer}: {line}");
        }
    }
}

proptest! {
    #[test]
    fn never_panics(text in "\\PC{0,200}") {
        let _ = Config::parse(&text);
    }

    #[test]
    fn never_panics_on_json_like_text(text in "[{}\\[\\]\":,a-z0-9_.\\\\-]{0,200}") {
        let _ = Config::parse(&text);
    }

    #[test]
    fn reads_what_it_writes(workers: u32, bytes: u64, host in "[a-z]{1,8}", app in proptest::collection::vec("[ -~]{0,8}", 0..4)) {
        let config = Config { workers, cache: Cache { bytes, ..Cache::default() }, hostname: host, app, ..Config::default() };
        prop_assert_eq!(Config::parse(&config.to_json()), Ok(config));
    }
}

#[test]
fn deep_nesting_is_refused() {
    let deep = "[".repeat(100_000);
    assert!(error(&deep).starts_with("configuration: not JSON: recursion limit exceeded"));
}
