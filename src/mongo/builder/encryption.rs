//! The option of the builder that encrypts the data of sessions.

use crate::error::Result;
use crate::mongo::builder::MongoStoreBuilder;
use crate::mongo::codec::DataFormat;

impl MongoStoreBuilder {
    /// Encrypts each session's data with the newest of these keys before it is sent, and decrypts data with any of
    /// them. Default: none, and data is stored in plain form.
    ///
    /// Only the data is encrypted, by XChaCha20-Poly1305, and bound to its document. Data that was altered, cut, or
    /// moved from another document is a [`Decode`](crate::ErrorKind::Decode) error. What encryption does not hide or
    /// prevent:
    ///
    /// - A reader of the database sees the number of sessions, and for each session the digest of its id, its times,
    ///   its owner and its approximate size.
    /// - A writer to the database can remove a session, prolong it, change or remove its owner, and restore an older
    ///   state of the same session.
    /// - The cache, if there is one, has plain data in the memory of this process.
    ///
    /// Plain sessions can still be read, unless the keys [refuse](crate::Keys::require_encrypted) them. To change
    /// keys see [`Keys`](crate::Keys). If the key is lost, the data is lost. The cost is 45 bytes for each session,
    /// and some microseconds for each save and for each load that MongoDB serves. It cannot be combined with
    /// [`queryable`](Self::queryable).
    #[cfg(feature = "encryption")]
    #[cfg_attr(docsrs, doc(cfg(feature = "encryption")))]
    pub fn encryption(mut self, keys: crate::mongo::Keys) -> Self {
        self.keys = Some(keys);
        self
    }

    #[cfg(feature = "encryption")]
    pub(crate) fn data_format(&self) -> Result<DataFormat> {
        match (&self.keys, &self.format) {
            (None, format) => Ok(format.clone()),
            (Some(_), DataFormat::Native) => Err(crate::error::Error::config(
                "`queryable` and `encryption` contradict each other, because MongoDB cannot query \
                 encrypted data: leave one of them out",
            )),
            (Some(keys), _) => Ok(DataFormat::Encrypted(keys.clone().checked()?.into())),
        }
    }

    #[cfg(not(feature = "encryption"))]
    #[allow(clippy::unnecessary_wraps, reason = "with the feature `encryption` it may fail")]
    pub(crate) fn data_format(&self) -> Result<DataFormat> {
        Ok(self.format.clone())
    }
}
