//! The client side of the network benchmarks: `netload ADDRESS SECONDS CASE`, prints one JSON object.
//!
//! Cases: `stream-in` and `stream-out` (as the server sees it; Mb/s), `rr-64`, `rr-16k` (transactions/s over one
//! connection), `udp-1k` (echoed datagrams/s, 16 in flight).

use anykernel_bench::{ECHO, RESPOND, SINK, SOURCE};
use serde_json::json;
use std::io::{Error, ErrorKind, Read, Result, Write};
use std::net::{IpAddr, Shutdown, TcpStream, UdpSocket};
use std::process::ExitCode;
use std::time::{Duration, Instant};

const CHUNK: usize = 64 << 10;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let parsed = match args.as_slice() {
        [address, seconds, case] => address
            .parse::<IpAddr>()
            .ok()
            .zip(seconds.parse::<f64>().ok())
            .map(|(a, s)| (a, s, case.as_str())),
        _ => None,
    };
    let Some((address, seconds, case)) = parsed else {
        eprintln!("usage: netload ADDRESS SECONDS stream-in|stream-out|rr-64|rr-16k|udp-1k");
        return ExitCode::from(2);
    };
    let limit = Duration::from_secs_f64(seconds);
    let result = match case {
        "stream-in" => stream_in(address, limit).map(|value| ("Mb/s", value)),
        "stream-out" => stream_out(address, limit).map(|value| ("Mb/s", value)),
        "rr-64" => respond(address, limit, 64).map(|value| ("1/s", value)),
        "rr-16k" => respond(address, limit, 16 << 10).map(|value| ("1/s", value)),
        "udp-1k" => udp(address, limit).map(|value| ("1/s", value)),
        _ => Err(Error::new(ErrorKind::InvalidInput, "no such case")),
    };
    match result {
        Ok((unit, value)) => {
            println!("{}", json!({"case": case, "unit": unit, "value": value}));
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("netload: {case} against {address}: {error}");
            ExitCode::FAILURE
        }
    }
}

fn connect(address: IpAddr, port: u16) -> Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&(address, port).into(), Duration::from_secs(5))?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    stream.set_write_timeout(Some(Duration::from_secs(20)))?;
    Ok(stream)
}

fn megabits(bytes: u64, time: Duration) -> f64 {
    bytes as f64 * 8.0 / 1e6 / time.as_secs_f64()
}

/// The clock stops when the server has confirmed that it took everything in.
fn stream_in(address: IpAddr, limit: Duration) -> Result<f64> {
    let mut stream = connect(address, SINK)?;
    let buffer = vec![0x5a; CHUNK];
    let start = Instant::now();
    let mut bytes = 0;
    while start.elapsed() < limit {
        bytes += stream.write(&buffer)? as u64;
    }
    stream.shutdown(Shutdown::Write)?;
    stream.read_exact(&mut [0])?;
    Ok(megabits(bytes, start.elapsed()))
}

fn stream_out(address: IpAddr, limit: Duration) -> Result<f64> {
    let mut stream = connect(address, SOURCE)?;
    let mut buffer = vec![0; CHUNK];
    let start = Instant::now();
    let mut bytes = 0;
    while start.elapsed() < limit {
        match stream.read(&mut buffer)? {
            0 => return Err(ErrorKind::UnexpectedEof.into()),
            n => bytes += n as u64,
        }
    }
    Ok(megabits(bytes, start.elapsed()))
}

fn respond(address: IpAddr, limit: Duration, size: usize) -> Result<f64> {
    let mut stream = connect(address, RESPOND)?;
    stream.set_nodelay(true)?;
    let mut request = vec![0x5a; 8 + size];
    request[..4].copy_from_slice(&(size as u32).to_be_bytes());
    request[4..8].copy_from_slice(&(size as u32).to_be_bytes());
    let mut response = vec![0; size];
    let start = Instant::now();
    let mut count = 0u64;
    while start.elapsed() < limit {
        stream.write_all(&request)?;
        stream.read_exact(&mut response)?;
        count += 1;
    }
    Ok(count as f64 / start.elapsed().as_secs_f64())
}

fn udp(address: IpAddr, limit: Duration) -> Result<f64> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.connect((address, ECHO))?;
    socket.set_read_timeout(Some(Duration::from_millis(50)))?;
    let data = [0x5a; 1024];
    let mut buffer = [0; 2048];
    let start = Instant::now();
    let mut count = 0u64;
    let mut in_flight = 0;
    while start.elapsed() < limit {
        while in_flight < 16 {
            socket.send(&data)?;
            in_flight += 1;
        }
        match socket.recv(&mut buffer) {
            Ok(_) => {
                count += 1;
                in_flight -= 1;
            }
            // Lost on the way: fill the window again.
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                in_flight = 0
            }
            Err(error) => return Err(error),
        }
    }
    if count == 0 {
        return Err(Error::new(ErrorKind::TimedOut, "no datagram came back"));
    }
    Ok(count as f64 / start.elapsed().as_secs_f64())
}
