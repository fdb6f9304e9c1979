//! On systems without Unix signals there is no server of our own, only the server of `MONGODB_URI`.

use std::path::Path;

use crate::error::Error;
use crate::{Builder, Kind};

/// No value of this type exists.
#[derive(Debug)]
pub(crate) enum Own {}

impl Own {
    pub(crate) fn start(_options: Builder) -> Result<Self, Error> {
        Err(Error::Unsupported(
            "a test server can be started on Linux and macOS only: set MONGODB_URI to a MongoDB \
             server you have (tests which need to stop or pause a server cannot run here)"
                .to_owned(),
        ))
    }

    pub(crate) fn kill(&mut self) -> Result<(), Error> {
        match *self {}
    }

    pub(crate) fn stop(&mut self) -> Result<(), Error> {
        match *self {}
    }

    pub(crate) fn restart(&mut self) -> Result<(), Error> {
        match *self {}
    }

    pub(crate) fn pause(&self) -> Result<(), Error> {
        match *self {}
    }

    pub(crate) fn resume(&self) -> Result<(), Error> {
        match *self {}
    }

    pub(crate) fn wait(&mut self) -> Result<(), Error> {
        match *self {}
    }

    pub(crate) fn pid(&self) -> Option<u32> {
        match *self {}
    }

    pub(crate) fn port(&self) -> u16 {
        match *self {}
    }

    pub(crate) fn folder(&self) -> &Path {
        match *self {}
    }

    pub(crate) fn kind(&self) -> Kind {
        match *self {}
    }

    pub(crate) fn title(&self) -> &str {
        match *self {}
    }

    pub(crate) fn why(&self) -> &str {
        match *self {}
    }
}
