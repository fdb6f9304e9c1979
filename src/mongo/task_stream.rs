//! `TaskStream`: turns what a background task sends over a channel into a stream.

use std::pin::Pin;
use std::task::{Context, Poll};

use futures_core::Stream;
use tokio::sync::mpsc;

use crate::error::{Error, Result};

/// A message of the task.
pub(crate) enum Step<T> {
    /// The next item. An error here does not end the stream.
    Item(Result<T>),
    /// The last message: the task is complete, or it failed.
    Ended(Result<()>),
}

/// The stream of a task's items.
///
/// It ends without an error only after [`Step::Ended`]. If the task ends without that message (the runtime
/// was shut down, or the task panicked), the last item is an error: a consumer must not take a part of a
/// list for the whole.
pub(crate) struct TaskStream<T> {
    receiver: mpsc::Receiver<Step<T>>,
    ended: bool,
}

impl<T> TaskStream<T> {
    /// A stream that buffers `capacity` messages, and the sender for its task.
    pub(crate) fn channel(capacity: usize) -> (mpsc::Sender<Step<T>>, Self) {
        let (sender, receiver) = mpsc::channel(capacity);
        (sender, Self { receiver, ended: false })
    }

    /// A stream whose only item is this error.
    pub(crate) fn failed(error: Error) -> Self {
        let (sender, stream) = Self::channel(1);
        // The channel has room for one message.
        let _ = sender.try_send(Step::Ended(Err(error)));
        stream
    }
}

impl<T> Stream for TaskStream<T> {
    type Item = Result<T>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let step = std::task::ready!(self.receiver.poll_recv(context));
        if let Some(Step::Item(item)) = step {
            return Poll::Ready(Some(item));
        }
        self.ended = true;
        Poll::Ready(match step {
            Some(Step::Ended(Ok(()))) => None,
            Some(Step::Ended(Err(error))) => Some(Err(error)),
            _ => Some(Err(Error::cut_off())),
        })
    }
}

#[cfg(test)]
mod tests {
    use futures::StreamExt;

    use super::*;
    use crate::error::ErrorKind;

    #[tokio::test]
    async fn a_complete_stream_ends_without_an_error() {
        let (sender, mut stream) = TaskStream::channel(3);
        assert!(sender.send(Step::Item(Ok(1))).await.is_ok());
        assert!(sender.send(Step::Ended(Ok(()))).await.is_ok());
        assert_eq!(stream.next().await.unwrap().unwrap(), 1);
        assert!(stream.next().await.is_none());
        assert!(stream.next().await.is_none());
    }

    #[tokio::test]
    async fn the_error_of_an_item_does_not_end_the_stream_and_that_of_the_task_does() {
        let (sender, mut stream) = TaskStream::channel(3);
        assert!(sender.send(Step::Item(Err(Error::config("one item")))).await.is_ok());
        assert!(sender.send(Step::Item(Ok(2))).await.is_ok());
        assert!(sender.send(Step::Ended(Err(Error::closed()))).await.is_ok());
        assert_eq!(stream.next().await.unwrap().unwrap_err().kind(), ErrorKind::Config);
        assert_eq!(stream.next().await.unwrap().unwrap(), 2);
        assert_eq!(stream.next().await.unwrap().unwrap_err().kind(), ErrorKind::Closed);
        assert!(stream.next().await.is_none());
    }

    #[tokio::test]
    async fn a_task_that_ends_without_its_last_message_is_an_error() {
        let (sender, mut stream) = TaskStream::<i32>::channel(1);
        drop(sender);
        assert!(stream.next().await.unwrap().is_err());
        assert!(stream.next().await.is_none());
    }

    #[tokio::test]
    async fn a_failed_stream_has_a_single_item() {
        let mut stream = TaskStream::<i32>::failed(Error::closed());
        assert_eq!(stream.next().await.unwrap().unwrap_err().kind(), ErrorKind::Closed);
        assert!(stream.next().await.is_none());
    }
}
