//! The suite that every host must pass, as a library.
