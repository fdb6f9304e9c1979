//! Parses JSON numbers without loss, whichever features of `serde_json` are on.
//!
//! A [`Number`] is an integer or a 64-bit float. If any crate of the app switches on the feature
//! `arbitrary_precision` of `serde_json`, a `Number` is its text instead: `1.10` stays `1.10`.

use serde_json::Number;

/// Whether a `Number` may be its text. If this is true by mistake, [`parse`] only takes longer.
const MAY_BE_TEXT: bool = size_of::<Number>() == size_of::<String>();

/// Parses a JSON number. `None` if the text is not a JSON number, or if the number must become a 64-bit
/// float and is too large for one.
pub(crate) fn parse(text: &str) -> Option<Number> {
    let parsed: Number = text.parse().ok()?;
    if !MAY_BE_TEXT || parsed.to_string() == text {
        return Some(parsed);
    }
    // `serde_json` parses `1e300` as a number with the text `1e+300`. In some of its versions, a number that
    // was made from a float has the text `1e300`. Return that number if its text is the one to parse.
    let float = text.parse().ok().and_then(Number::from_f64);
    Some(float.filter(|float| float.to_string() == text).unwrap_or(parsed))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_parsed_back_from_its_own_text() {
        let floats =
            [0.0, -0.0, 1.0, 1.1, 1e16, 1e300, -1e-300, 5e-324, f64::MAX, f64::MIN_POSITIVE];
        let texts =
            ["0", "-1", "18446744073709551615", "-9223372036854775808", "1.10", "1e5", "-0"];
        let floats = floats.into_iter().filter_map(Number::from_f64);
        for number in floats.chain(texts.into_iter().map(|text| text.parse().unwrap())) {
            let text = number.to_string();
            let back = parse(&text).unwrap();
            assert_eq!((back.to_string(), &back), (text, &number));
        }
    }

    #[test]
    fn a_text_that_is_not_a_json_number_is_refused() {
        for text in [
            "", "-", "+1", "01", "-01", "1.", ".5", "1e", "1e+", "0x1", "1 ", " 1", "1,", "NaN",
            "1_0",
        ] {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}
