//! [`delete_pages`]: deletes the sessions that a filter matches, page by page.

use crate::error::Result;
use crate::session::id::SessionKey;

/// One walk over the sessions that a filter matches, in the order of their keys. MongoDB implements
/// it, and the simulation.
pub(crate) trait DeletePages: Send + 'static {
    /// Reads the next page. `None` at the end of the walk.
    fn next(&mut self) -> impl Future<Output = Result<Option<DeletePage>>> + Send;

    /// Removes those of these sessions that still match the filter, and returns their number.
    fn remove(&self, keys: &[SessionKey]) -> impl Future<Output = Result<u64>> + Send;
}

/// A page of the sessions that a filter matches.
#[derive(Default)]
pub(crate) struct DeletePage {
    pub(crate) live: Vec<SessionKey>,
    pub(crate) expired: Vec<SessionKey>,
}

/// Deletes the sessions that exist when the walk begins, and returns the number of live ones.
///
/// Calls `begin` with the keys before it removes their sessions. If the removal succeeds, it calls the
/// function that `begin` returned. Otherwise it drops that function.
pub(crate) async fn delete_pages<P: DeletePages, H: FnOnce() + Send>(
    mut pages: P,
    begin: impl Fn(&[SessionKey]) -> H + Send,
) -> Result<u64> {
    let mut deleted = 0;
    while let Some(page) = pages.next().await? {
        let finish = begin(&page.live);
        deleted += pages.remove(&page.live).await?;
        finish();
        let finish = begin(&page.expired);
        pages.remove(&page.expired).await?;
        finish();
    }
    Ok(deleted)
}
