//! The JSON configuration: any text is read, or refused with one line; what was read means the same when written.

use anykernel::config::Config;

/// One execution.
pub fn run(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    match Config::parse(text) {
        Ok(config) => {
            let written = config.to_json();
            assert_eq!(Config::parse(&written).as_ref(), Ok(&config), "not the same after {written}");
            for index in 0..config.interfaces.len() + 1 {
                let _ = anykernel_net::Settings::parse(&config, index);
            }
        }
        Err(line) => {
            assert!(line.starts_with("configuration: ") && !line.contains('\n'), "{line:?} is not one line");
            assert!(line.len() < 600, "{} bytes of message", line.len());
        }
    }
}
