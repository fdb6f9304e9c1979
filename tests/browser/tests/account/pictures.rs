//! Takes the pictures in the README again: `SCREENSHOTS=DIR cargo test -p session-browser-test
//! pictures`.

use std::path::PathBuf;
use std::time::Duration;

use super::browser::{Chromium, IPHONE, LINUX, WINDOWS};
use super::{PASSWORD, app, sign_in, sign_up};
use session_test_support::app::Visitor;

const WIDTH: u32 = 1_000;

/// How long visitors come and go before the picture is taken, in seconds, so that the chart has
/// data.
const VISITS: u32 = 105;

#[tokio::test]
async fn takes_the_pictures_if_asked() {
    let Some(folder) = std::env::var_os("SCREENSHOTS").map(PathBuf::from) else { return };
    let Some(chromium) = Chromium::start().await else { return };
    let app = app().await;
    let browsers = [
        chromium.browser(&app, IPHONE).await,
        chromium.browser(&app, WINDOWS).await,
        chromium.browser(&app, LINUX).await,
    ];
    let [phone, office, home] = &browsers;
    sign_up(phone, "ferris").await;
    sign_in(office, "ferris").await;

    // Visitors who come, look at their devices a few times and leave. Their number rises and falls.
    let mut every = tokio::time::interval(Duration::from_secs(1));
    let client = Visitor::new();
    client.post(&app, "/sign-up", &[("name", "corro"), ("password", PASSWORD)]).await;
    for second in 0..VISITS {
        every.tick().await;
        let wave = (f64::from(second) / 14.0).sin() + 1.3;
        #[allow(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a small number"
        )]
        let visits = (wave * 9.0) as usize + fastrand::usize(0..4);
        for _ in 0..visits {
            client.page(&app, "/devices").await;
        }
        for _ in 0..fastrand::usize(0..3) {
            // The app stores the error in a session, and hashes no password for it.
            Visitor::new().post(&app, "/sign-up", &[("name", ""), ("password", "")]).await;
        }
        for _ in 0..fastrand::usize(0..3) {
            // An id that no store issued, so only MongoDB can tell that it does not exist.
            let unknown = format!("{:021}A", fastrand::u32(..));
            Visitor::with_cookie(&app, &unknown).page(&app, "/devices").await;
        }
    }
    home.open("/operator").await;
    home.wait_for("#state", &["All is well"]).await;
    std::fs::write(folder.join("operator.png"), home.picture(WIDTH).await).unwrap();
    sign_in(home, "ferris").await;
    home.open("/devices").await;
    std::fs::write(folder.join("devices.png"), home.picture(WIDTH).await).unwrap();
}
