//! The process target on real USB devices: a Debian guest in which libusb sees what QEMU plugs in and pulls out, and a stick that is
//! mounted there through FUSE. Needs `qemu-system-x86_64`, `mkfs.fat`, `fsck.fat`, mtools, lsusb and Debian's generic kernel
//! (fetched without privileges).

mod usb_support;

use anykernel_tests::module::PATIENCE;
use anykernel_tests::plugged::{all_ok, boot, guest, plug_stick, pull};
use anykernel_tests::{free_port, usb_capture};
use anykernel_userspace::qemu::linux_module::guest::DebianGuest;
use serde_json::json;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};
use usb_support::{run, stick, sum};

/// What FUSE's scripts begin with.
const MOUNTED: &str = r#"
mounted() { grep -q ' /m fuse ' /proc/mounts; }
wait_mount() { n=0; while ! mounted && [ $n -lt 300 ]; do sleep 0.1; n=$((n + 1)); done; mounted; }
mkdir /m
"#;

fn files(script: &str) -> DebianGuest {
    guest(&format!("{MOUNTED}{script}"), &["xhci-pci", "fuse"])
}

/// The second stick is pulled out while it is written to.
const MOUNT: &str = r#"
there 2-1
there 2-2
anykernel mount usb:2-1 /m &
pid=$!
check mounted wait_mount
check sums sh -c 'cd /m && sha256sum -c SHA256SUMS'
check names [ "$(ls /m | tr '\n' ' ')" = "SHA256SUMS big.bin empty odd.bin " ]
check read-only not touch /m/new
kill -INT $pid
wait $pid
check ended [ $? = 0 ]
check unmounted not mounted

anykernel mount --write usb:2-1 /m &
pid=$!
check mounted-again wait_mount
mkdir -p /m/one/two
cp /m/big.bin /m/one/copy.bin
mv /m/one/copy.bin "/m/one/two/a longer name.bin"
rm /m/odd.bin
echo text >/m/text
echo more >>/m/text
exec 4</m/text
rm /m/text
check open-and-removed [ "$(cat <&4)" = "text
more" ]
exec 4<&-
echo other >/m/text
check same-name [ "$(cat /m/text)" = other ]
mv /m/text /m/empty
check replaced [ "$(cat /m/empty)" = other ]
check busy-directory not rmdir /m/one
umount /m
wait $pid
check ended-by-umount [ $? = 0 ]
check copied cmp "$(anykernel cat usb:2-1:/big.bin | sha256sum >/tmp/a; echo /tmp/a)" \
	"$(anykernel cat 'usb:2-1:/one/two/a longer name.bin' | sha256sum >/tmp/b; echo /tmp/b)"

anykernel mount --write usb:2-2 /m 2>/tmp/said &
pid=$!
check mounted-second wait_mount
cd /m
exec 5<big.bin
(while dd if=/dev/zero of=long.bin bs=64k count=8 conv=fsync,notrunc 2>/dev/null; do :; done; echo "ok writer") &
writer=$!
n=0; while [ ! -s long.bin ] && [ $n -lt 300 ]; do sleep 0.1; n=$((n + 1)); done
check writes [ -s long.bin ]
echo @pull
gone 2-2
wait $writer
check reader not dd bs=1M count=1 of=/dev/null <&5
exec 5<&-
cd /
wait $pid
check status [ $? = 1 ]
check reason grep -q "it was unplugged" /tmp/said
check clean not mounted

echo @plug
there 2-2
anykernel mount usb:2-2 /m &
pid=$!
check mounted-replugged wait_mount
check sums-replugged sh -c 'cd /m && sha256sum -c SHA256SUMS'
kill -INT $pid
wait $pid

(while anykernel cp /bin/anykernel usb:2-2:/program 2>/tmp/said; do :; done; echo "ok copier") &
copier=$!
sleep 3
echo @pull
wait $copier
cat /tmp/said

anykernel mount usb:2-4 /m 2>&1 | head -1
rmmod fuse
anykernel mount usb:2-1 /m 2>&1 | head -1
"#;

#[test]
fn a_stick_is_mounted_written_and_pulled_out() {
    let dir = tempfile::tempdir().unwrap();
    let (first, _) = stick(dir.path());
    let second = dir.path().join("second.img");
    fs::copy(&first, &second).unwrap();
    let node = |name: &str, path: &Path| {
        format!("driver=raw,node-name={name},file.driver=file,file.filename={}", path.display())
    };
    let mut args = Vec::new();
    let nodes = [node("first", &first), node("second", &second)];
    for (port, (name, node)) in (1..).zip(["first", "second"].into_iter().zip(&nodes)) {
        args.extend(["-blockdev".to_owned(), node.clone(), "-device".to_owned()]);
        args.push(format!("usb-storage,id={name},drive={name},bus=usb.0,port={port}"));
    }
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let text = boot(dir.path(), files(MOUNT), &args, |qmp, wish| match wish {
        "pull" => pull(qmp, "second"),
        "plug" => plug_stick(qmp, "second", "2"),
        other => panic!("{other}"),
    });
    let checks = "mounted sums names read-only ended unmounted mounted-again open-and-removed same-name replaced \
        busy-directory ended-by-umount copied mounted-second writes writer reader status reason clean copier mounted-replugged \
        sums-replugged";
    all_ok(&text, &checks.split_whitespace().collect::<Vec<_>>());
    for line in ["usb:2-4: no disk is there", "there is no /dev/fuse"] {
        assert!(text.contains(line), "{line} is not said in:\n{text}");
    }
    run("fsck.fat", &["-n", first.to_str().unwrap()]);
}

/// Fields of a device by lines `name value`, and the device that they are of: bus and address.
type Fields = BTreeMap<(u32, u32), Vec<(String, String)>>;

/// Fields that lsusb shows the same way.
const SAME: &[&str] = &[
    "bcdUSB",
    "bDeviceClass",
    "bDeviceSubClass",
    "bDeviceProtocol",
    "bMaxPacketSize0",
    "idVendor",
    "idProduct",
    "bcdDevice",
    "iManufacturer",
    "iProduct",
    "iSerial",
    "bNumConfigurations",
    "wTotalLength",
    "bNumInterfaces",
    "bConfigurationValue",
    "iConfiguration",
    "bInterfaceNumber",
    "bAlternateSetting",
    "bNumEndpoints",
    "bInterfaceClass",
    "bInterfaceSubClass",
    "bInterfaceProtocol",
    "iInterface",
    "bEndpointAddress",
    "wMaxPacketSize",
    "bInterval",
    "bMaxBurst",
    "bcdHID",
    "bCountryCode",
    "wDescriptorLength",
    "bcdCDC",
    "bMasterInterface",
    "bSlaveInterface",
    "bmEthernetStatistics",
    "wMaxSegmentSize",
    "bNumberPowerFilters",
];

/// Name and value of a field, numbers in one form.
fn field(line: &str) -> Option<(String, String)> {
    let mut words = line.split_whitespace();
    let name = words.next().filter(|name| SAME.contains(name))?;
    let value = words.next()?;
    let number = match value.strip_prefix("0x") {
        Some(hex) => u32::from_str_radix(hex, 16).ok(),
        None => value.parse().ok(),
    };
    Some((name.into(), number.map_or_else(|| value.into(), |number| number.to_string())))
}

fn ours(text: &str) -> Fields {
    let (mut all, mut bus, mut device) = (Fields::new(), 0, None);
    for line in text.lines() {
        let line = line.trim_end();
        if let Some(address) = line.trim_start().strip_prefix("address ") {
            device = Some((bus, address.parse().unwrap()));
        } else if let Some((name, _)) =
            line.trim_start().split_once("  ").filter(|(name, _)| !name.contains(' '))
            && let Ok(number) = name.trim_start_matches("usb").split('-').next().unwrap().parse()
        {
            bus = number;
        } else if let (Some(device), Some(field)) = (device, field(line)) {
            all.entry(device).or_default().push(field);
        }
    }
    all
}

fn theirs(text: &str) -> Fields {
    let (mut all, mut device, mut own) = (Fields::new(), (0, 0), false);
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        if let ["Bus", bus, "Device", address, "ID", ..] = words[..] {
            device = (bus.parse().unwrap(), address.trim_end_matches(':').parse().unwrap());
            own = true;
        }
        // What it asks the device for beside the descriptors that we show.
        let other = ["Hub Descriptor", "Binary Object Store", "Device Qualifier", "Device Status"];
        own &= !other.iter().any(|title| line.trim_start().starts_with(title));
        if let Some(field) = field(line).filter(|_| own) {
            all.entry(device).or_default().push(field);
        }
    }
    all
}

const LIST: &str = r#"
for path in 1-2 1-2.1 1-2.2 1-3 2-1; do there $path; done
echo '== ours'
anykernel usb list --verbose
echo '== lsusb'
/usr/bin/lsusb -v 2>/dev/null
echo '== end'
usb-conformance 2-1 1-2.1
"#;

#[test]
fn devices_are_shown_as_lsusb_shows_them_and_the_contract_holds() {
    let dir = tempfile::tempdir().unwrap();
    let (image, _) = stick(dir.path());
    let mut files = files(LIST);
    files.program(Path::new("/usr/bin/lsusb"), "usr/bin/lsusb").unwrap();
    files.program(Path::new(env!("CARGO_BIN_EXE_usb-conformance")), "bin/usb-conformance").unwrap();
    let stick =
        format!("driver=raw,node-name=stick,read-only=on,file.driver=file,file.filename={}", image.display());
    let args = ["-blockdev", &stick, "-device", "usb-storage,drive=stick,bus=usb.0,port=1"];
    let others = ["usb-hub,port=2", "usb-kbd,port=2.1", "usb-mouse,port=2.2", "usb-net,port=3,netdev=n"];
    let others: Vec<String> = others.iter().map(|one| format!("{one},bus=usb.0")).collect();
    let mut args = args.to_vec();
    args.extend(["-netdev", "user,id=n"]);
    others.iter().for_each(|one| args.extend(["-device", one]));
    let text = boot(dir.path(), files, &args, |_, wish| panic!("{wish}"));
    let part = |from: &str, to: &str| {
        let (_, rest) = text.split_once(from).unwrap_or_else(|| panic!("no {from} in:\n{text}"));
        rest.split_once(to).unwrap_or_else(|| panic!("no {to} in:\n{text}")).0
    };
    let (ours, theirs) = (ours(part("== ours", "== lsusb")), theirs(part("== lsusb", "== end")));
    // QEMU's stick is not silent before a command, and its keyboard does not know how to clear a halt.
    for (place, beyond) in [("2-1: ", "usb/cancel: "), ("1-2.1: ", "usb/clear-halt: ")] {
        let checks: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix(place)).collect();
        assert_eq!(checks.len(), hypercall::conformance::USB_CHECKS.len(), "{text}");
        for check in checks.iter().filter(|check| !check.starts_with(beyond)) {
            assert!(check.ends_with(": pass"), "{place}{check}");
        }
    }
    assert_eq!(ours.len(), 7, "two root hubs and five devices:\n{text}");
    for (device, fields) in &ours {
        let other = theirs.get(device).unwrap_or_else(|| panic!("lsusb shows no {device:?}:\n{text}"));
        assert!(fields.len() > 20, "{device:?}: {fields:?}");
        for (at, (ours, theirs)) in fields.iter().zip(other).enumerate() {
            assert_eq!(ours, theirs, "field {at} of {device:?}:\n{text}");
        }
        assert_eq!(fields.len(), other.len(), "{device:?}:\n{text}");
    }
}

/// A keyboard is taken and listened to; then a file server on a network device, which is pulled out under it.
const TAKE: &str = r#"
there 2-1
there 1-2
there 1-3
anykernel run usb --net none --usb host:1-2 -- keys 4 >/tmp/keys &
pid=$!
n=0; while ! grep -q input /tmp/keys && [ $n -lt 300 ]; do sleep 0.1; n=$((n + 1)); done
echo @type
wait $pid
check keys [ $? = 0 ]
cat /tmp/keys
anykernel run httpd --net usb --usb host:1-3 --mount usb2-1:/ &
pid=$!
echo @fetch
gone 1-3
kill -INT $pid
wait $pid
check server [ $? = 0 ]
"#;

#[test]
fn a_keyboard_and_a_network_device_are_taken() {
    let dir = tempfile::tempdir().unwrap();
    let (image, big) = stick(dir.path());
    let port = free_port();
    let stick =
        format!("driver=raw,node-name=stick,read-only=on,file.driver=file,file.filename={}", image.display());
    let net = format!("user,id=n,hostfwd=tcp:127.0.0.1:{port}-:80");
    let args = [
        ["-blockdev", &stick],
        ["-device", "usb-storage,drive=stick,bus=usb.0,port=1"],
        ["-device", "usb-kbd,bus=usb.0,port=2"],
        ["-netdev", &net],
        ["-device", "usb-net,id=net,netdev=n,bus=usb.0,port=3"],
    ];
    let text = boot(dir.path(), files(TAKE), &args.concat(), |qmp, wish| match wish {
        "type" => {
            for code in ["a", "1"] {
                let key = json!({ "type": "qcode", "data": code });
                qmp.ask("send-key", json!({ "keys": [key], "hold-time": 50 })).unwrap();
                std::thread::sleep(Duration::from_millis(200));
            }
        }
        "fetch" => {
            let url = format!("http://127.0.0.1:{port}/big.bin");
            let start = Instant::now();
            let got = loop {
                let output = Command::new("curl").args(["-s", "--max-time", "20", &url]).output().unwrap();
                if output.status.success() && !output.stdout.is_empty() {
                    break output.stdout;
                }
                assert!(start.elapsed() < PATIENCE, "nothing answers at {url}");
                std::thread::sleep(Duration::from_millis(200));
            };
            assert_eq!(sum(&got), big);
            pull(qmp, "net");
        }
        other => panic!("{other}"),
    });
    all_ok(&text, &["keys", "server"]);
    for key in [r#""char":"a""#, r#""char":"1""#] {
        assert_eq!(text.matches(key).count(), 2, "pressed and released, {key}:\n{text}");
    }
}

/// Linux plays a network device (its own NCM function on its dummy controller) and fetches a file through it from a server that has
/// taken that device. Then it pulls that out, plugs another one in, and fetches again.
const NCM: &str = r#"
there 2-1
mount -t configfs none /sys/kernel/config
cd /sys/kernel/config/usb_gadget
for g in one two; do
	mkdir $g $g/configs/c.1 $g/functions/ncm.0
	echo 0x1209 >$g/idVendor
	echo 0x0001 >$g/idProduct
	ln -s $g/functions/ncm.0 $g/configs/c.1/
done
echo 02:00:00:00:01:02 >one/functions/ncm.0/host_addr
echo 02:00:00:00:02:02 >two/functions/ncm.0/host_addr
udc=$(ls /sys/class/udc)
fetch() {
	n=0; while ! curl -s --max-time 20 -o /tmp/got http://10.77.0.2/$1 && [ $n -lt 100 ]; do sleep 0.2; n=$((n + 1)); done
}
plug() {
	echo $udc >$1/UDC
	there 3-1
	nic=$(cat $1/functions/ncm.0/ifname)
	ip addr add 10.77.0.1/24 dev $nic
	ip link set $nic up
}
plug one
anykernel run httpd --net usb --usb host:3-1 --address 10.77.0.2/24 --mount usb2-1:/ >/tmp/said 2>&1 &
pid=$!
fetch SHA256SUMS
check small grep -q big.bin /tmp/got
fetch big.bin
echo "big.bin is $(sha256sum </tmp/got)"
ping -c 3 -s 1400 -q 10.77.0.2
check ping [ $? = 0 ]
echo >one/UDC
gone 3-1
ip addr flush dev $nic
plug two
rm /tmp/got
fetch SHA256SUMS
check another grep -q big.bin /tmp/got
kill -INT $pid
wait $pid
check server [ $? = 0 ]
cat /tmp/said
"#;

#[test]
fn a_network_device_that_linux_plays_is_taken() {
    let dir = tempfile::tempdir().unwrap();
    let (image, big) = stick(dir.path());
    let stick =
        format!("driver=raw,node-name=stick,read-only=on,file.driver=file,file.filename={}", image.display());
    let args = ["-blockdev", &stick, "-device", "usb-storage,drive=stick,bus=usb.0,port=1"];
    let mut files = files(NCM);
    files.drivers(&["dummy_hcd", "usb_f_ncm"]).unwrap();
    // busybox' wget does not work without the C library's files.
    files.program(Path::new("/usr/bin/curl"), "bin/curl").unwrap();
    let text = boot(dir.path(), files, &args, |_, wish| panic!("{wish}"));
    all_ok(&text, &["small", "ping", "another", "server"]);
    assert!(text.contains(&format!("big.bin is {big}")), "{text}");
}

/// A stick is listed, read, written and captured; behind it a port has a keyboard, which is no disk.
const READ_AND_WRITE: &str = r#"
there 2-1
there 1-2.1
anykernel usb list --json
anykernel ls usb:2-1:/ && echo listed
anykernel cp usb:2-1:/big.bin /tmp/big.bin && sha256sum /tmp/big.bin
head -c 3000000 /dev/urandom >/tmp/new.bin
anykernel cp /tmp/new.bin usb:2-1:/new.bin && anykernel cp usb:2-1:/new.bin /tmp/back.bin && cmp /tmp/new.bin /tmp/back.bin && echo written
anykernel ls usb:2-7:/
anykernel run usb list --net none --mount usb2-1:/ --usb-pcap /tmp/usb.pcap
echo capture begins
head -c 30000 /tmp/usb.pcap | od -An -v -tx1
echo capture ends
"#;

#[test]
fn a_stick_is_read_and_written() {
    let dir = tempfile::tempdir().unwrap();
    let (image, big) = stick(dir.path());
    let drive = format!("if=none,id=stick,format=raw,file={}", image.display());
    let devices = [
        "usb-storage,drive=stick,bus=usb.0,port=1",
        "usb-hub,bus=usb.0,port=2",
        "usb-kbd,bus=usb.0,port=2.1",
    ];
    let mut args = vec!["-drive", &drive];
    args.extend(devices.iter().flat_map(|device| ["-device", device]));
    let text = boot(dir.path(), files(READ_AND_WRITE), &args, |_, _| ());
    for path in ["usb1", "usb2", "1-2", "1-2.1", "2-1"] {
        assert!(text.contains(&format!(r#""path":"{path}""#)), "{path} is not listed:\n{text}");
    }
    assert!(text.contains("listed") && text.contains("written"), "{text}");
    assert!(text.contains(&big), "big.bin has another sum than {big}:\n{text}");
    assert!(text.contains("usb:2-7: no disk is there"), "{text}");
    run("fsck.fat", &["-n", image.to_str().unwrap()]);
    let (_, capture) = text.split_once("capture begins").expect("a capture");
    let (capture, _) = capture.split_once("capture ends").expect("a whole capture");
    let bytes: Vec<u8> =
        capture.split_whitespace().filter_map(|byte| u8::from_str_radix(byte, 16).ok()).collect();
    usb_capture::check(&bytes);
}
