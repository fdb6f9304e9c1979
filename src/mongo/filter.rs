//! Checks a caller's filter before it is sent, and guards the conditions on `data` in it.
//!
//! MongoDB cannot look into data that is stored as a text or encrypted. To a filter, such data has no keys at all:
//! `data.role` is missing, so `data.role != "admin"` holds for every such session, those of admins included. Two
//! rules keep `delete_where` from ending sessions for that reason.
//!
//! 1. The store sends only what is listed here: fields, query operators and expression operators that are known to
//!    read nothing else of the document. Anything else is a [`Config`](crate::ErrorKind::Config) error. (An earlier
//!    list of forbidden operators had gaps: `$getField`, `$let`, `"$data"` and `"$$ROOT"` read the data too.)
//! 2. For a session whose data MongoDB cannot look into, a condition on `data` is unknown: neither true nor false. A
//!    filter matches a session only if the whole filter is true (the three-valued logic of SQL):
//!
//! | `owner` | `data.x` | `$or` | `$and` | `$nor` of both |
//! |---|---|---|---|---|
//! | true | unknown | true: match | unknown: no match | false |
//! | false | unknown | unknown: no match | false | unknown: no match |
//!
//! MongoDB has no third value. So the guard makes a condition on `data` false where it is unknown, or true below an
//! odd number of negations.
//!
//! In `$expr`, the guard puts a `$cond` in the place of the condition. Some operators fail for a value of another
//! type: `$size` of a list that does not exist fails the whole command. A test of the type beside the expression
//! would not prevent that, because MongoDB may evaluate the parts of an
//! [`$and`](https://www.mongodb.com/docs/manual/reference/operator/aggregation/and/#error-handling) in any order.
//! [`$cond`](https://www.mongodb.com/docs/manual/reference/operator/aggregation/cond/) evaluates the branch that it
//! returns.

use bson::{Bson, Document, doc};

use crate::error::{Error, Result};
use crate::mongo::ops::query::and;
use crate::mongo::schema::REENCRYPT_FIELDS;

/// The fields other than `data`. Every store writes them in the same form.
const FIELDS: [&str; 8] =
    ["_id", "format", "expires", "rev", "created", "updated", "owner", REENCRYPT_FIELDS[1]];

/// The operators of a condition on one field that read only that field.
const CONDITIONS: &str = "$bitsAllClear $bitsAllSet $bitsAnyClear $bitsAnySet $eq $exists $gt $gte $in $lt \
    $lte $mod $ne $nin $options $regex $size $type";

/// The operators of an expression that read only their arguments.
const EXPRESSIONS: &str = "$abs $add $allElementsTrue $and $anyElementTrue $arrayElemAt $arrayToObject $avg \
    $binarySize $bsonSize $ceil $cmp $concat $concatArrays $cond $convert $dateAdd $dateDiff \
    $dateFromParts $dateFromString $dateSubtract $dateToParts $dateToString $dateTrunc $dayOfMonth \
    $dayOfWeek $dayOfYear $divide $eq $exp $filter $first $firstN $floor $gt $gte $hour $ifNull $in \
    $indexOfArray $indexOfBytes $indexOfCP $isArray $isNumber $isoDayOfWeek $isoWeek $isoWeekYear $last \
    $lastN $let $ln $log $log10 $lt $lte $ltrim $map $max $maxN $mergeObjects $millisecond $min $minN \
    $minute $mod $month $multiply $ne $not $objectToArray $or $pow $range $reduce $regexFind \
    $regexFindAll $regexMatch $replaceAll $replaceOne $reverseArray $round $rtrim $second \
    $setDifference $setEquals $setIntersection $setIsSubset $setUnion $size $slice $sortArray $split \
    $sqrt $strLenBytes $strLenCP $strcasecmp $substrBytes $substrCP $subtract $sum $switch $toBool \
    $toDate $toDecimal $toDouble $toInt $toLong $toLower $toObjectId $toString $toUpper $trim $trunc \
    $type $week $year $zip";

/// The operators that read the whole document if they have no `input`.
const EXPRESSIONS_WITH_INPUT: &str = "$getField $setField $unsetField";

/// The most levels that MongoDB takes in a document. Each level is a recursive call here.
/// <https://www.mongodb.com/docs/manual/reference/limits/#mongodb-limit-Nested-Depth-for-BSON-Documents>
const MAX_DEPTH: usize = 100;

/// Returns the guarded filter, for a store whose data is `queryable` or not.
///
/// # Errors
///
/// `Config` for a filter that reads `data` if MongoDB cannot look into it, and for a filter with anything that may
/// read `data` in an unknown way.
pub(crate) fn guarded(filter: Document, queryable: bool) -> Result<Document> {
    Guard { queryable }.filter(filter, Sense::True, 0)
}

/// What a condition must be for the whole filter to find a session.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Sense {
    True,
    False,
}

impl Sense {
    fn negated(self) -> Self {
        match self {
            Self::True => Self::False,
            Self::False => Self::True,
        }
    }
}

/// What an expression reads of a session.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Reads {
    /// It has the same value for each session.
    Nothing,
    /// Fields beside `data`.
    Field,
    Data,
}

struct Guard {
    queryable: bool,
}

impl Guard {
    fn filter(&self, filter: Document, sense: Sense, depth: usize) -> Result<Document> {
        check_depth(depth)?;
        let mut guarded = Document::new();
        // The conditions that are already combined with an alternative for unknown data.
        let mut others = Vec::new();
        let mut needs_data = false;
        for (key, value) in filter {
            match key.as_str() {
                "$and" | "$or" => {
                    guarded.insert(key, self.filters(value, sense, depth)?);
                }
                "$nor" => {
                    guarded.insert(key, self.filters(value, sense.negated(), depth)?);
                }
                "$expr" => {
                    guarded.insert(key, self.expression(value, sense, depth)?);
                }
                "$comment" => {
                    guarded.insert(key, value);
                }
                operator if operator.starts_with('$') => return Err(unknown_operator()),
                path => {
                    check_condition(&value, depth)?;
                    let reads_data = self.path(path)? == Reads::Data;
                    if reads_data && sense == Sense::False {
                        others.push(or_unknown(doc! { path: value }));
                    } else {
                        needs_data |= reads_data;
                        guarded.insert(path, value);
                    }
                }
            }
        }
        if needs_data {
            guarded = and(guarded, doc! { "data": is_document() });
        }
        for other in others {
            guarded = and(guarded, other);
        }
        Ok(guarded)
    }

    /// The filters of a `$and`, `$or` or `$nor`.
    fn filters(&self, filters: Bson, sense: Sense, depth: usize) -> Result<Vec<Bson>> {
        let Bson::Array(filters) = filters else {
            return Err(malformed("`$and`, `$or` and `$nor` take a list of filters"));
        };
        if filters.is_empty() {
            return Err(malformed("`$and`, `$or` and `$nor` take a list that is not empty"));
        }
        let mut guarded = Vec::with_capacity(filters.len());
        for filter in filters {
            let Bson::Document(filter) = filter else {
                return Err(malformed("`$and`, `$or` and `$nor` take a list of filters"));
            };
            if matches_everything(&filter) {
                return Err(malformed("an empty filter in a list finds every session"));
            }
            guarded.push(self.filter(filter, sense, depth + 1)?.into());
        }
        Ok(guarded)
    }

    /// Guards an expression that is true or false. Only its outermost `$and`, `$or` and `$not` are taken apart: a
    /// comparison that reads the data and something else is unknown as a whole.
    fn expression(&self, expression: Bson, sense: Sense, depth: usize) -> Result<Bson> {
        match self.reads(&expression, depth)? {
            Reads::Nothing => return Err(reads_nothing()),
            // Taken apart even if no part reads the data, because each part must read a field.
            Reads::Field | Reads::Data if is_logic(&expression) => {}
            Reads::Field => return Ok(expression),
            Reads::Data => {
                let is_document = doc! { "$eq": [{ "$type": "$data" }, "object"] };
                return Ok(
                    doc! { "$cond": [is_document, expression, sense == Sense::False] }.into()
                );
            }
        }
        let Bson::Document(logic) = expression else { return Ok(expression) };
        let mut guarded = Document::new();
        for (operator, arguments) in logic {
            let sense = if operator == "$not" { sense.negated() } else { sense };
            let arguments = match arguments {
                Bson::Array(arguments) => {
                    let mut parts = Vec::with_capacity(arguments.len());
                    for argument in arguments {
                        parts.push(self.expression(argument, sense, depth + 1)?);
                    }
                    Bson::Array(parts)
                }
                argument => self.expression(argument, sense, depth + 1)?,
            };
            guarded.insert(operator, arguments);
        }
        Ok(guarded.into())
    }

    /// Returns what an expression reads, or an error if that is not known.
    ///
    /// Only a path that begins with `data` reads the data: the value of a variable comes from another part of the
    /// expression, which is checked too.
    fn reads(&self, expression: &Bson, depth: usize) -> Result<Reads> {
        check_depth(depth)?;
        let all = |arguments: &mut dyn Iterator<Item = &Bson>| {
            let mut reads = Reads::Nothing;
            for argument in arguments {
                reads = reads.max(self.reads(argument, depth + 1)?);
            }
            Ok(reads)
        };
        match expression {
            Bson::String(text) => self.operand(text),
            Bson::Array(items) => all(&mut items.iter()),
            Bson::Document(document) => match single_operator(document)? {
                None => all(&mut document.values()),
                Some(("$literal", _)) => Ok(Reads::Nothing),
                Some((operator, arguments)) if is_in(EXPRESSIONS, operator) => {
                    self.reads(arguments, depth + 1)
                }
                Some((operator, Bson::Document(arguments)))
                    if is_in(EXPRESSIONS_WITH_INPUT, operator)
                        && arguments.contains_key("input") =>
                {
                    all(&mut arguments.values())
                }
                Some((operator, _)) if is_in(EXPRESSIONS_WITH_INPUT, operator) => {
                    Err(reads_whole_document())
                }
                Some(_) => Err(unknown_operator()),
            },
            _ => Ok(Reads::Nothing),
        }
    }

    /// Returns what a text reads: a path, a variable, or plain text.
    fn operand(&self, text: &str) -> Result<Reads> {
        let Some(variable) = text.strip_prefix("$$") else {
            return text.strip_prefix('$').map_or(Ok(Reads::Nothing), |path| self.path(path));
        };
        let (name, path) = match variable.split_once('.') {
            Some((name, path)) => (name, Some(path)),
            None => (variable, None),
        };
        match (name, path) {
            ("ROOT" | "CURRENT", Some(path)) => self.path(path),
            ("ROOT" | "CURRENT", None) => Err(reads_whole_document()),
            ("NOW", None) => Ok(Reads::Nothing),
            // A variable that an expression defines.
            _ if name.starts_with(|first: char| first.is_ascii_lowercase()) => Ok(Reads::Nothing),
            _ => Err(malformed("it has a variable that this store does not know")),
        }
    }

    /// Returns what a path reads, or an error if no session has it or MongoDB cannot look there.
    fn path(&self, path: &str) -> Result<Reads> {
        if FIELDS.contains(&path) {
            return Ok(Reads::Field);
        }
        if path != "data" && !path.starts_with("data.") {
            return Err(unknown_field());
        }
        if self.queryable { Ok(Reads::Data) } else { Err(not_queryable()) }
    }
}

/// Whether a filter has no condition, and so matches every session.
pub(crate) fn matches_everything(filter: &Document) -> bool {
    filter.keys().all(|key| key == "$comment")
}

/// Checks the condition on one field.
fn check_condition(condition: &Bson, depth: usize) -> Result<()> {
    check_depth(depth)?;
    let Bson::Document(operators) = condition else { return Ok(()) };
    if !operators.keys().any(|key| key.starts_with('$')) {
        // A document to compare with.
        return Ok(());
    }
    for (operator, argument) in operators {
        check_operator(operator, argument, depth)?;
    }
    Ok(())
}

fn check_operator(operator: &str, argument: &Bson, depth: usize) -> Result<()> {
    match (operator, argument) {
        ("$not", condition) => check_condition(condition, depth + 1),
        ("$all", Bson::Array(items)) => {
            items.iter().try_for_each(|item| check_condition(item, depth + 1))
        }
        ("$elemMatch", Bson::Document(element)) => check_element(element, depth + 1),
        _ if is_in(CONDITIONS, operator) => Ok(()),
        _ => Err(unknown_operator()),
    }
}

/// Checks the condition on an element of a list: on itself, or on its own fields, which are not fields of the
/// session.
fn check_element(element: &Document, depth: usize) -> Result<()> {
    check_depth(depth)?;
    for (key, value) in element {
        match (key.as_str(), value) {
            ("$and" | "$or" | "$nor", Bson::Array(elements)) => {
                for element in elements {
                    let Bson::Document(element) = element else {
                        return Err(malformed("`$and`, `$or` and `$nor` take a list of filters"));
                    };
                    check_element(element, depth + 1)?;
                }
            }
            (operator, argument) if operator.starts_with('$') => {
                check_operator(operator, argument, depth)?;
            }
            (_, condition) => check_condition(condition, depth)?,
        }
    }
    Ok(())
}

/// The operator of an expression and its arguments; `None` for a document whose values are expressions.
fn single_operator(document: &Document) -> Result<Option<(&str, &Bson)>> {
    let Some((operator, arguments)) = document.iter().find(|(key, _)| key.starts_with('$')) else {
        return Ok(None);
    };
    if document.len() > 1 {
        return Err(malformed("an expression has one operator"));
    }
    Ok(Some((operator, arguments)))
}

/// Whether an expression is a logical operator.
fn is_logic(expression: &Bson) -> bool {
    let operator = expression.as_document().and_then(|document| document.keys().next());
    operator.is_some_and(|operator| matches!(operator.as_str(), "$and" | "$or" | "$not"))
}

fn is_in(list: &str, operator: &str) -> bool {
    list.split_ascii_whitespace().any(|known| known == operator)
}

fn is_document() -> Document {
    doc! { "$type": "object" }
}

/// Makes a condition on the data true where it is unknown.
fn or_unknown(condition: Document) -> Document {
    doc! { "$or": [condition, { "data": { "$not": is_document() } }] }
}

fn check_depth(depth: usize) -> Result<()> {
    if depth < MAX_DEPTH {
        return Ok(());
    }
    Err(malformed("it is nested deeper than 100 levels"))
}

fn malformed(why: &str) -> Error {
    Error::config(format!("the filter is malformed: {why}"))
}

fn not_queryable() -> Error {
    Error::config(
        "the filter asks for `data`, and this store keeps data as a text, or \
         encrypted, so that MongoDB sees no keys: build it with MongoStoreBuilder::queryable(true)",
    )
}

fn reads_nothing() -> Error {
    malformed(
        "`$expr`, and each part of `$and`, `$or` and `$not` in it, must read a field: else it finds every \
         session, or none",
    )
}

fn unknown_field() -> Error {
    Error::config(
        "the filter asks for a field that no session has: the fields are those of StoredSession, and \
         `data_path` writes the path of a key of the data",
    )
}

fn reads_whole_document() -> Error {
    Error::config(
        "the filter reads the stored document as a whole, and so data that MongoDB cannot look into: \
         name the fields that it asks for",
    )
}

/// The message does not name the operator: it may come from a request.
fn unknown_operator() -> Error {
    Error::config(
        "the filter has an operator that this store does not know, which may read data that MongoDB \
         cannot look into: `MongoStore::find` says which may be used, and `collection()` asks MongoDB \
         itself",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A test against a server cannot show this: MongoDB may evaluate the parts of a filter in any order, but it may
    /// also keep their order.
    #[test]
    fn a_guarded_expression_tests_the_type_inside_the_expression() {
        let guard = |condition: Document, otherwise: bool| {
            doc! { "$cond": [{ "$eq": [{ "$type": "$data" }, "object"] }, condition, otherwise] }
        };
        let is_array = || doc! { "$isArray": "$data.cart" };
        let size = || doc! { "$gt": [{ "$size": "$data.cart" }, 2] };
        let owned = || doc! { "$eq": ["$owner", "7"] };
        for (filter, sent) in [
            (doc! { "$expr": size() }, doc! { "$expr": guard(size(), false) }),
            (
                doc! { "$expr": { "$and": [owned(), is_array(), size()] } },
                doc! { "$expr": { "$and": [owned(), guard(is_array(), false), guard(size(), false)] } },
            ),
            (
                doc! { "$expr": { "$or": [owned(), { "$not": [size()] }] } },
                doc! { "$expr": { "$or": [owned(), { "$not": [guard(size(), true)] }] } },
            ),
            (
                doc! { "$nor": [{ "$expr": { "$not": size() } }] },
                doc! { "$nor": [{ "$expr": { "$not": guard(size(), false) } }] },
            ),
        ] {
            assert_eq!(guarded(filter, true).unwrap(), sent);
        }
    }
}
