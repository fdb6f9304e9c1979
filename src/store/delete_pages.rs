//! Ends the sessions that a filter finds, page by page, over any backend.

use crate::error::Result;
use crate::session::id::SessionKey;

/// One walk along the keys of the sessions that a filter finds. Private: over MongoDB, and over a
/// simulated database in tests.
pub(crate) trait DeletePages: Send + 'static {
    /// Finds the next page; `None` at the end of the walk.
    fn next(&mut self) -> impl Future<Output = Result<Option<DeletePage>>> + Send;

    /// Removes those of these sessions that the filter still finds; answers with how many.
    fn remove(&self, keys: &[SessionKey]) -> impl Future<Output = Result<u64>> + Send;
}

/// Some of the sessions that a filter finds.
#[derive(Default)]
pub(crate) struct DeletePage {
    pub(crate) live: Vec<SessionKey>,
    pub(crate) expired: Vec<SessionKey>,
}

/// Ends the sessions that stand in the collection when this begins; answers with how many live ones.
///
/// `hold` is called with keys before they are removed. What it returns is called once that has succeeded,
/// and dropped otherwise.
pub(crate) async fn delete_pages<P: DeletePages, H: FnOnce() + Send>(
    mut pages: P,
    hold: impl Fn(&[SessionKey]) -> H + Send,
) -> Result<u64> {
    let mut ended = 0;
    while let Some(page) = pages.next().await? {
        let forget = hold(&page.live);
        ended += pages.remove(&page.live).await?;
        forget();
        let forget = hold(&page.expired);
        pages.remove(&page.expired).await?;
        forget();
    }
    Ok(ended)
}
