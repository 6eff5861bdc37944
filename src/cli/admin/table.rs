//! Tables for people.

use std::io::{self, Write};

use serde_json::Value;

use super::times::shown_time;

/// A heading, and the field under it; `a.b` is a field of a field.
pub type Column = (&'static str, &'static str);

/// Columns as wide as their widest cell, two blanks apart.
pub fn print_table(out: &mut impl Write, columns: &[Column], rows: &[Value]) -> io::Result<()> {
    if rows.is_empty() {
        return writeln!(out, "none");
    }
    let heads = columns.iter().map(|(head, _)| (*head).to_owned()).collect();
    let cells = rows.iter().map(|row| columns.iter().map(|(_, key)| cell(row, key)).collect());
    let lines: Vec<Vec<String>> = std::iter::once(heads).chain(cells).collect();
    let width = |column: usize| {
        let widths = lines.iter().map(|line| line[column].chars().count());
        widths.max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns.len()).map(width).collect();
    for line in &lines {
        let padded = line.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
        writeln!(out, "{}", padded.collect::<Vec<_>>().join("  ").trim_end())?;
    }
    Ok(())
}

/// A field as text: times as UTC, lists with commas, nothing as a dash.
pub fn cell(row: &Value, key: &str) -> String {
    let value = key.split('.').fold(row, |value, part| &value[part]);
    let is_time = key.ends_with("_at") || ["at", "from", "until", "start_time"].contains(&key);
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) if text.is_empty() => "-".to_owned(),
        Value::String(text) => text.clone(),
        Value::Array(list) if list.is_empty() => "-".to_owned(),
        Value::Array(list) => {
            let parts = list.iter().map(|item| match item {
                Value::String(text) => text.clone(),
                other => other.to_string(),
            });
            parts.collect::<Vec<_>>().join(",")
        }
        Value::Number(at) if is_time => at.as_i64().map_or_else(|| at.to_string(), shown_time),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn columns_line_up_and_times_are_read() {
        let rows = [
            json!({"id": "a", "policy": {"models": ["x", "y"]}, "created_at": 0}),
            json!({"id": "longer", "policy": {"models": null}, "created_at": 86_399}),
        ];
        let columns = [("ID", "id"), ("MODELS", "policy.models"), ("CREATED", "created_at")];
        let mut out = Vec::new();
        print_table(&mut out, &columns, &rows).expect("written");
        let text = String::from_utf8(out).expect("text");
        let expected = "ID      MODELS  CREATED\na       x,y     1970-01-01 00:00Z\nlonger  -       1970-01-01 23:59Z\n";
        assert_eq!(text, expected);
    }
}
