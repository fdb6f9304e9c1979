//! The option that has data encrypted, and the form that it is stored in then.

use crate::error::Result;
use crate::mongo::builder::MongoStoreBuilder;
use crate::mongo::codec::DataFormat;

impl MongoStoreBuilder {
    /// Encrypts each session's data before it is sent, with the newest of these keys, and reads what
    /// any of them has encrypted. Default: none, and data is stored as it is.
    ///
    /// The data alone, by XChaCha20-Poly1305 and bound to its document: data that was altered, cut,
    /// or moved from another document is a [`Decode`](crate::ErrorKind::Decode) error. Whoever reads
    /// the database still sees how many sessions there are, the digests of their ids, their times,
    /// their owners and about how large each is; who writes to it can still remove a session, prolong
    /// it, give it to another owner or to none, or put back an older state of the same one. The cache, if there is one, holds plain data in
    /// this process's memory.
    ///
    /// Plain sessions are read as before, unless the keys [refuse](crate::Keys::require_encrypted)
    /// them; to change keys see [`Keys`](crate::Keys). Without the key there is no way back
    /// to the data. Costs 45 bytes for each session and some microseconds for each save and each load
    /// that goes to MongoDB. Cannot be combined with [`queryable`](Self::queryable).
    #[cfg(feature = "encryption")]
    #[cfg_attr(docsrs, doc(cfg(feature = "encryption")))]
    pub fn encryption(mut self, keys: crate::mongo::Keys) -> Self {
        self.keys = Some(keys);
        self
    }

    #[cfg(feature = "encryption")]
    pub(crate) fn form(&self) -> Result<DataFormat> {
        match (&self.keys, &self.form) {
            (None, form) => Ok(form.clone()),
            (Some(_), DataFormat::Native) => Err(crate::error::Error::config(
                "`queryable` and `encryption` contradict each other, since what is encrypted cannot \
                 be queried: leave one of them out",
            )),
            (Some(keys), _) => Ok(DataFormat::Encrypted(keys.clone().checked()?.into())),
        }
    }

    #[cfg(not(feature = "encryption"))]
    #[allow(clippy::unnecessary_wraps, reason = "with the feature `encryption` it may fail")]
    pub(crate) fn form(&self) -> Result<DataFormat> {
        Ok(self.form.clone())
    }
}
