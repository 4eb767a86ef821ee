//! Links the images: with the memory layout of `link.ld`, at fixed addresses.

fn main() {
    println!("cargo::rerun-if-changed=link.ld");
    let bare = std::env::var("CARGO_CFG_TARGET_OS").is_ok_and(|os| os == "none");
    if bare && let Ok(dir) = std::env::var("CARGO_MANIFEST_DIR") {
        for arg in
            [&format!("-T{dir}/link.ld"), "--no-pie", "-zmax-page-size=4096", "-znorelro", "--build-id=none"]
        {
            println!("cargo::rustc-link-arg-bins={arg}");
        }
    }
}
