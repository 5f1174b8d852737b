//! What a customer may say about itself. Each type can only be had by parsing, so a value of it is valid.
//!
//! What never happens: an error, or a `Debug` text, that repeats a password.

use std::fmt;

use serve::ApiError;

/// A password's length, in characters.
pub(crate) const PASSWORD_CHARS: std::ops::RangeInclusive<usize> = 8..=128;

const MAX_NAME_CHARS: usize = 100;
const MAX_ADDRESS_CHARS: usize = 300;
/// RFC 5321, section 4.5.3.1.3, less the angle brackets of a path.
const MAX_EMAIL_BYTES: usize = 254;
/// RFC 5321, section 4.5.3.1.1.
const MAX_EMAIL_LOCAL_BYTES: usize = 64;
const MAX_PHONE_CHARS: usize = 32;
/// E.164 allows 15 digits; the shortest numbers that are dialled have 3.
const PHONE_DIGITS: std::ops::RangeInclusive<usize> = 3..=15;

/// A value that is not acceptable, by its field's name in the API.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub(crate) struct Invalid {
    field: &'static str,
    problem: Problem,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
enum Problem {
    #[error("must not be empty")]
    Empty,
    #[error("must have at least {0} characters")]
    TooShort(usize),
    #[error("must have at most {0} characters")]
    TooLong(usize),
    #[error("must not have control characters")]
    Control,
    #[error("is not an e-mail address")]
    NotEmail,
    #[error("is not a phone number: {min} to {max} digits, with spaces, '-', '.', '(', ')' or a leading '+'",
        min = PHONE_DIGITS.start(), max = PHONE_DIGITS.end())]
    NotPhone,
}

impl From<Invalid> for ApiError {
    fn from(invalid: Invalid) -> ApiError {
        ApiError::invalid_parameter(invalid.field, invalid.problem)
    }
}

/// Text of one line, without white space around it.
fn line(field: &'static str, text: &str, max_chars: usize) -> Result<String, Invalid> {
    let text = text.trim();
    let problem = if text.is_empty() {
        Problem::Empty
    } else if text.chars().count() > max_chars {
        Problem::TooLong(max_chars)
    } else if text.chars().any(char::is_control) {
        Problem::Control
    } else {
        return Ok(text.to_owned());
    };
    Err(Invalid { field, problem })
}

/// An e-mail address: as it is written, and as it is compared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Email {
    text: String,
    key: String,
}

impl Email {
    /// Checks the shape only. Whether the address exists, its mail server knows; so nothing is refused here
    /// that a mail server might accept, but what cannot be told apart from a slip.
    pub(crate) fn parse(text: &str) -> Result<Email, Invalid> {
        let text = line("email", text, MAX_EMAIL_BYTES)?;
        let well_formed = text.len() <= MAX_EMAIL_BYTES
            && !text.contains(char::is_whitespace)
            && text.rsplit_once('@').is_some_and(|(local, domain)| {
                (1..=MAX_EMAIL_LOCAL_BYTES).contains(&local.len())
                    && !local.contains('@')
                    && domain.split('.').all(|label| !label.is_empty())
            });
        if !well_formed {
            return Err(Invalid { field: "email", problem: Problem::NotEmail });
        }
        let key = text.to_lowercase();
        Ok(Email { text, key })
    }

    /// As the customer wrote it.
    pub(crate) fn text(&self) -> &str {
        &self.text
    }

    /// Equal for addresses that differ in case only.
    pub(crate) fn key(&self) -> &str {
        &self.key
    }
}

/// A phone number: as it is written, and its digits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Phone {
    text: String,
    key: String,
}

impl Phone {
    pub(crate) fn parse(text: &str) -> Result<Phone, Invalid> {
        let text = line("phone_number", text, MAX_PHONE_CHARS)?;
        let key: String = text.chars().filter(char::is_ascii_digit).collect();
        let unsigned = text.strip_prefix('+').unwrap_or(&text);
        let well_formed = PHONE_DIGITS.contains(&key.len())
            && unsigned.chars().all(|c| c.is_ascii_digit() || matches!(c, ' ' | '-' | '.' | '(' | ')'));
        if !well_formed {
            return Err(Invalid { field: "phone_number", problem: Problem::NotPhone });
        }
        Ok(Phone { text, key })
    }

    /// As the customer wrote it.
    pub(crate) fn text(&self) -> &str {
        &self.text
    }

    /// The digits alone: equal for numbers that differ in punctuation only.
    pub(crate) fn key(&self) -> &str {
        &self.key
    }
}

/// A password. Its characters are taken as they are.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Password(String);

impl Password {
    /// A password that may be chosen.
    pub(crate) fn parse(text: String) -> Result<Password, Invalid> {
        let chars = text.chars().count();
        let problem = if chars < *PASSWORD_CHARS.start() {
            Problem::TooShort(*PASSWORD_CHARS.start())
        } else if chars > *PASSWORD_CHARS.end() {
            Problem::TooLong(*PASSWORD_CHARS.end())
        } else {
            return Ok(Password(text));
        };
        Err(Invalid { field: "password", problem })
    }

    /// A password that somebody tries: the bound on its length holds, so that hashing has one; what was never
    /// acceptable is just wrong.
    pub(crate) fn attempt(text: String) -> Result<Password, Invalid> {
        let max = *PASSWORD_CHARS.end();
        if text.chars().count() > max {
            return Err(Invalid { field: "password", problem: Problem::TooLong(max) });
        }
        Ok(Password(text))
    }

    /// The bytes to hash.
    pub(crate) fn expose(&self) -> &[u8] {
        self.0.as_bytes()
    }
}

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Password(..)")
    }
}

/// Who a customer is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Person {
    pub(crate) firstname: String,
    pub(crate) lastname: String,
    pub(crate) email: Email,
}

impl Person {
    pub(crate) fn parse(firstname: &str, lastname: &str, email: &str) -> Result<Person, Invalid> {
        Ok(Person {
            firstname: line("firstname", firstname, MAX_NAME_CHARS)?,
            lastname: line("lastname", lastname, MAX_NAME_CHARS)?,
            email: Email::parse(email)?,
        })
    }
}

/// Where a customer's goods go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Shipping {
    pub(crate) address: String,
    pub(crate) phone: Phone,
}

impl Shipping {
    pub(crate) fn parse(address: &str, phone_number: &str) -> Result<Shipping, Invalid> {
        Ok(Shipping {
            address: line("address", address, MAX_ADDRESS_CHARS)?,
            phone: Phone::parse(phone_number)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn e_mail_addresses_are_equal_in_any_case() {
        let email = Email::parse(" Ming.Hsu@Example.COM ").unwrap();
        assert_eq!((email.text(), email.key()), ("Ming.Hsu@Example.COM", "ming.hsu@example.com"));
        for odd in ["o'neill+shop@sub.example.co.uk", "müller@straße.example", "a@localhost"] {
            assert!(Email::parse(odd).is_ok(), "{odd}");
        }
        let long =
            format!("{}@{}", "a".repeat(64), ["b".repeat(63), "c".repeat(63), "d".repeat(62)].join("."));
        assert!(Email::parse(&long).is_err());
        for wrong in ["", "a", "@b", "a@", "a@@b", "a@b@c", "a b@c", "a@b..c", "a@b.", "a\u{0}@b"] {
            assert!(Email::parse(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn phone_numbers_are_equal_with_any_punctuation() {
        let phone = Phone::parse("+886 (2) 2345-6789").unwrap();
        assert_eq!((phone.text(), phone.key()), ("+886 (2) 2345-6789", "886223456789"));
        for wrong in ["", "12", "1234567890123456", "12a4", "1+23", "--------"] {
            assert!(Phone::parse(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn a_password_is_counted_in_characters_and_never_shown() {
        assert!(Password::parse("é".repeat(8)).is_ok());
        assert!(Password::parse("é".repeat(128)).is_ok());
        let short = Password::parse("s3cret!".to_owned()).unwrap_err();
        assert_eq!(short.to_string(), "password: must have at least 8 characters");
        let long = Password::parse("é".repeat(129)).unwrap_err();
        assert_eq!(long.to_string(), "password: must have at most 128 characters");
        assert_eq!(format!("{:?}", Password::parse("abcd5432".to_owned())), "Ok(Password(..))");
    }

    #[test]
    fn a_line_is_bounded_and_has_no_control_characters() {
        assert_eq!(line("address", "  a b  ", 3).unwrap(), "a b");
        assert_eq!(line("address", " \t", 3).unwrap_err().to_string(), "address: must not be empty");
        assert_eq!(
            line("address", "abcd", 3).unwrap_err().to_string(),
            "address: must have at most 3 characters"
        );
        assert!(line("address", "a\nb", 3).is_err());
    }
}
