//! The server side of the network benchmarks for Linux: the same services as the `netbench` application.

use anykernel_bench::{ECHO, RESPOND, SINK, SOURCE};
use std::io::{Read, Result, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::thread;

const CHUNK: usize = 64 << 10;

fn main() -> Result<()> {
    serve(SINK, |mut stream| {
        let mut buffer = vec![0; CHUNK];
        while stream.read(&mut buffer)? > 0 {}
        stream.write_all(&[1])
    })?;
    serve(SOURCE, |mut stream| {
        let buffer = vec![0x5a; CHUNK];
        loop {
            stream.write_all(&buffer)?;
        }
    })?;
    serve(RESPOND, |mut stream| {
        stream.set_nodelay(true)?;
        let mut buffer = vec![0x5a; 1 << 20];
        let mut header = [0; 8];
        loop {
            stream.read_exact(&mut header)?;
            let number =
                |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().expect("four bytes")) as usize;
            let (request, response) = (number(0), number(4));
            stream.read_exact(&mut buffer[..request])?;
            stream.write_all(&buffer[..response])?;
        }
    })?;
    let socket = UdpSocket::bind(("0.0.0.0", ECHO))?;
    println!("netpeer: ready");
    let mut buffer = [0; 2048];
    loop {
        let (length, from) = socket.recv_from(&mut buffer)?;
        let _ = socket.send_to(&buffer[..length], from);
    }
}

fn serve(port: u16, service: fn(TcpStream) -> Result<()>) -> Result<()> {
    let listener = TcpListener::bind(("0.0.0.0", port))?;
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || service(stream));
        }
    });
    Ok(())
}
